//! `ferry`'s own subcommands against the server: what they print and how they exit.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::recorder::Fixture;

fn ferry(line: &str, fixture: &Fixture) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferry"));
    command.args(line.split_whitespace()).arg("--qmp").arg(&fixture.path).stdin(Stdio::null());
    command
}

fn run(line: &str, fixture: &Fixture) -> Output {
    ferry(line, fixture).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A `ferry migrate` that has begun a migration which does not end by itself.
fn start_endless_migration(fixture: &Fixture) -> (Child, BufReader<ChildStdout>) {
    let mut child = ferry("migrate tcp:nowhere:1", fixture).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("MIGRATION_PASS") {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "ferry migrate ended");
    }
    (child, lines)
}

fn end(mut child: Child) -> (Option<i32>, String) {
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    (child.wait().unwrap().code(), errors)
}

#[test]
fn short_commands_do_what_they_say() {
    let fixture = Fixture::start();
    assert_eq!(text(&run("status", &fixture).stdout), "guest      running\n");
    assert!(run("pause", &fixture).status.success());
    assert_eq!(text(&run("status", &fixture).stdout), "guest      paused\n");
    assert!(run("resume", &fixture).status.success());
    assert!(run("powerdown", &fixture).status.success());
    let refused = run("start-postcopy", &fixture);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(text(&refused.stderr).lines().count(), 1);
    assert!(run("quit", &fixture).status.success() && fixture.has_quit());
}

#[test]
fn bitmaps_do_what_they_are_told() {
    let fixture = Fixture::start();
    let bitmaps = || {
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        text(&run("bitmap list", &fixture).stdout).lines().skip(1).map(words).collect::<Vec<_>>()
    };
    let done = |command: &str| {
        let output = run(command, &fixture);
        assert!(output.status.success(), "{command}: {}", text(&output.stderr));
    };
    done("bitmap add d0 b0 --granularity 4K");
    assert_eq!(bitmaps(), ["d0 b0 4096 0 recording"]);
    fixture.write("d0", 4096);
    assert_eq!(bitmaps(), ["d0 b0 4096 4096 recording"]);
    done("bitmap disable d0 b0");
    fixture.write("d0", 0);
    assert_eq!(bitmaps(), ["d0 b0 4096 4096 disabled"]);
    done("bitmap add d1 b1 --persistent --disabled");
    done("bitmap merge d1 b1 d0:b0 b1");
    done("bitmap enable d0 b0");
    done("bitmap clear d0 b0");
    assert_eq!(bitmaps(), ["d0 b0 4096 0 recording", "d1 b1 65536 65536 disabled, persistent"]);
    done("bitmap remove d0 b0");
    done("bitmap remove d1 b1");
    assert!(bitmaps().is_empty());
    let refused = run("bitmap merge d0 b0 b1", &fixture);
    assert_eq!((refused.status.code(), text(&refused.stderr)), (Some(1), "ferry: Dirty bitmap 'b0' not found\n"));
    assert_eq!(run("bitmap add nodisk b0", &fixture).status.code(), Some(1));
    assert_eq!(run("bitmap add d0 b0 --granularity 3K", &fixture).status.code(), Some(2));
    assert_eq!(run("bitmap merge d0 b0", &fixture).status.code(), Some(2));
}

#[test]
fn migrate_prints_a_line_per_event_and_writes_the_report() {
    let fixture = Fixture::start();
    let report = fixture.path.with_extension("json");
    let mut command = ferry("migrate tcp:host:1 --downtime 20ms --max-bandwidth 1Gbit", &fixture);
    let output = command.arg("--report").arg(&report).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let events: Vec<Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.last().unwrap()["data"]["status"], "completed");
    assert!(text(&output.stderr).starts_with("migration        completed after 5.0 ms"), "{}", text(&output.stderr));
    let written: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(written["total-us"], 5000);
    assert!(text(&run("status", &fixture).stdout).contains("migration  completed after 5.0 ms"));
}

#[test]
fn ctrl_c_cancels_the_migration() {
    let fixture = Fixture::start();
    let (child, _lines) = start_endless_migration(&fixture);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let (code, errors) = end(child);
    assert_eq!(code, Some(1));
    assert!(errors.starts_with("cancelling the migration\n"), "{errors}");
    assert!(errors.ends_with("ferry: the migration was cancelled in a test\n"), "{errors}");
}

#[test]
fn source_that_vanishes_is_a_failure() {
    let fixture = Fixture::start();
    let (child, _lines) = start_endless_migration(&fixture);
    drop(fixture);
    let (code, errors) = end(child);
    assert_eq!(code, Some(1));
    assert!(errors.contains("went away before the migration ended"), "{errors}");
}

#[test]
fn refusals_are_one_sentence_and_wrong_usage_is_2() {
    let fixture = Fixture::start();
    let path = fixture.path.clone();
    drop(fixture.server);
    let output = Command::new(env!("CARGO_BIN_EXE_ferry")).args(["status", "--qmp"]).arg(&path).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = text(&output.stderr);
    assert!(errors.starts_with("ferry: cannot connect to ") && errors.lines().count() == 1, "{errors}");
    let output = Command::new(env!("CARGO_BIN_EXE_ferry")).args(["run", "--kernel", "k", "--memory", "lots"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}
