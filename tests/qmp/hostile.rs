//! Clients that mean harm, or do it all the same. Every test ends with a well-behaved client being served.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use ferry::qmp::Event;
use serde_json::{Value, json};

use crate::raw_client::{LIMIT, RawClient};
use crate::recorder::Fixture;

fn assert_serves(fixture: &Fixture) {
    let mut client = RawClient::negotiated(&fixture.path);
    assert_eq!(client.ask(r#"{"execute": "query-status"}"#)["return"]["running"], true);
}

#[test]
fn garbage_gets_one_error_and_the_session_goes_on() {
    let fixture = Fixture::start();
    let mut client = RawClient::negotiated(&fixture.path);
    let garbage: [&[u8]; 8] = [
        b"{]\n",
        b"{\xff",
        b"{'bad \xff",
        b"{\"execute\": \"query-status\", \"id\":\"\n",
        b"null\n",
        b"{}",
        b"{\"execute\": true}",
        b"{\"execute\": \"stop\" \"x\"}",
    ];
    for bytes in garbage {
        assert_eq!(client.ask(bytes)["error"]["class"], "GenericError", "{bytes:?}");
        assert_eq!(client.ask(r#"{"execute": "nonsense", "id": 1}"#)["error"]["class"], "CommandNotFound", "after {bytes:?}");
    }
    assert_serves(&fixture);
}

#[test]
fn enormous_and_deep_values_are_refused_and_not_kept() {
    let fixture = Fixture::start();
    let mut client = RawClient::negotiated(&fixture.path);
    let enormous =
        ["{\"execute\": \"".to_string() + &"x".repeat(8 << 20) + "\"}\n", "{\"a\":".repeat(100_000) + "\n", "[".repeat(1 << 20) + "\n"];
    for text in enormous {
        assert_eq!(client.ask(text)["error"]["class"], "GenericError");
    }
    assert_eq!(client.ask(r#"{"execute": "query-status"}"#)["return"]["running"], true);
}

#[test]
fn half_a_command_disturbs_nobody() {
    let fixture = Fixture::start();
    let mut half = RawClient::negotiated(&fixture.path);
    half.send(r#"{"execute": "quit""#);
    assert_serves(&fixture);
    drop(half);
    assert!(fixture.server.wait_for_clients_to_leave(LIMIT));
    assert!(!fixture.has_quit());
}

#[test]
fn client_that_does_not_read_events_is_dropped_and_delays_nobody() {
    let fixture = Fixture::start();
    let mut sluggard = RawClient::negotiated(&fixture.path);
    let mut reader = RawClient::negotiated(&fixture.path);
    // Far more than a socket's buffer and the queue hold together; the reader takes each before the next is sent.
    for _ in 0..20_000 {
        fixture.events.emit(&Event::Stop);
        assert_eq!(reader.read()["event"], "STOP");
    }
    while sluggard.read() != Value::Null {}
    assert_serves(&fixture);
}

#[test]
fn client_that_floods_commands_without_reading_is_held_back() {
    let fixture = Fixture::start();
    let flooder = RawClient::negotiated(&fixture.path).stream.into_inner();
    flooder.set_nonblocking(true).unwrap();
    // The server stops reading once the answers find no place any more; then nothing more can be sent.
    let mut sent = 0_usize;
    let started = Instant::now();
    let mut blocked = 0;
    while blocked < 1000 {
        match (&flooder).write(br#"{"execute": "query-commands"}"#) {
            Ok(count) => (sent, blocked) = (sent + count, 0),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                blocked += 1;
                assert_serves(&fixture);
            }
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => break,
            Err(error) => panic!("{error}"),
        }
        assert!(started.elapsed() < LIMIT && sent < 64 << 20, "{sent} bytes of commands were taken");
    }
    assert_serves(&fixture);
}

#[test]
fn too_many_clients_are_turned_away_until_some_leave() {
    let fixture = Fixture::start();
    let clients: Vec<_> = (0..32).map(|_| RawClient::negotiated(&fixture.path)).collect();
    let mut refused = std::io::BufReader::new(UnixStream::connect(&fixture.path).unwrap());
    refused.get_ref().set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(std::io::BufRead::read_until(&mut refused, b'\n', &mut Vec::new()).unwrap(), 0);
    drop(clients);
    assert!(fixture.server.wait_for_clients_to_leave(LIMIT));
    assert_serves(&fixture);
}

#[test]
fn many_clients_coming_and_going_are_all_served() {
    let fixture = Fixture::start();
    std::thread::scope(|scope| {
        for worker in 0..8 {
            let path = &fixture.path;
            scope.spawn(move || {
                for round in 0..40 {
                    let mut client = RawClient::negotiated(path);
                    client.send(format!(r#"{{"execute": "query-status", "id": [{worker}, {round}]}}"#));
                    assert_eq!(client.read()["id"], json!([worker, round]));
                }
            });
        }
    });
    assert!(fixture.server.wait_for_clients_to_leave(LIMIT));
}
