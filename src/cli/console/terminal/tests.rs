//! The raw mode, seen from outside: a child process with a pseudo-terminal as its standard input leaves in many ways.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use rustix::termios::LocalModes;

use super::*;

/// Tells the test below, run in a child process, in which way to leave.
const WAY: &str = "FERRY_TEST_WAY_OUT";

/// In the child: enters raw mode and leaves. Run by hand it does nothing, having no way to leave.
#[test]
fn child() {
    let Ok(way) = std::env::var(WAY) else { return };
    for signal in FATAL {
        // Whoever runs the tests may ignore some of them (nohup), which children inherit.
        // SAFETY: signal with SIG_DFL installs no handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let terminal = RawTerminal::enter().unwrap();
    assert!(terminal.is_some(), "standard input must be a terminal");
    println!("raw: {}", !is_cooked(&stdin()));
    match way.as_str() {
        "drop" => drop(terminal),
        "panic" => panic!("on purpose"),
        "exit" => std::process::exit(3),
        "abort" => std::process::abort(),
        signal => {
            // SAFETY: raise has no preconditions.
            unsafe { libc::raise(signal.parse().unwrap()) };
        }
    }
}

fn is_cooked(terminal: &impl std::os::fd::AsFd) -> bool {
    tcgetattr(terminal).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
}

fn pseudo_terminal() -> (OwnedFd, OwnedFd) {
    let (mut controller, mut terminal) = (-1, -1);
    use std::ptr::{null, null_mut};
    // SAFETY: both descriptors are written to variables of this frame, and owned by nobody else.
    unsafe {
        assert_eq!(libc::openpty(&mut controller, &mut terminal, null_mut(), null(), null()), 0);
        (OwnedFd::from_raw_fd(controller), OwnedFd::from_raw_fd(terminal))
    }
}

fn leave(way: &str) -> ExitStatus {
    let (_controller, terminal) = pseudo_terminal();
    assert!(is_cooked(&terminal));
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cli::console::terminal::tests::child", "--nocapture"])
        .env(WAY, way)
        .stdin(File::from(terminal.try_clone().unwrap()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let was_raw = lines.filter(|line| line.ends_with("raw: true")).count();
    let status = child.wait().unwrap();
    assert_eq!(was_raw, 1, "{way}: the child was not in raw mode");
    assert!(is_cooked(&terminal), "{way}: the terminal was left in raw mode");
    status
}

#[test]
fn every_way_out_restores_the_terminal() {
    assert_eq!(leave("drop").code(), Some(0));
    assert_ne!(leave("panic").code(), Some(0));
    assert_eq!(leave("exit").code(), Some(3));
    assert_eq!(leave("abort").signal(), Some(libc::SIGABRT));
    for signal in FATAL {
        assert_eq!(leave(&signal.to_string()).signal(), Some(signal));
    }
}
