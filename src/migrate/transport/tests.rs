use std::fs;
use std::io::IoSlice;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(20))
}

fn interrupt() -> Interrupt {
    Interrupt::new().unwrap()
}

fn any_port() -> Address {
    "tcp:127.0.0.1:0".parse().unwrap()
}

/// The two ends of a connection, each with an interrupt of its own.
fn pair(address: &Address) -> ((Connection, Interrupt), (Connection, Interrupt)) {
    let (here, there) = (interrupt(), interrupt());
    let listener = Listener::bind(address).unwrap();
    let client = connect(listener.address(), &here, soon()).unwrap();
    let server = listener.accept(&there, soon()).unwrap();
    ((client, here), (server, there))
}

fn both_kinds() -> (tempfile::TempDir, [Address; 3]) {
    let directory = tempfile::tempdir().unwrap();
    let unix = Address::Unix(directory.path().join("socket"));
    (directory, [any_port(), "tcp:[::1]:0".parse().unwrap(), unix])
}

#[test]
fn addresses_are_what_they_print() {
    for text in ["tcp:host.example:4444", "tcp:10.0.0.1:0", "tcp:[::1]:65535", "unix:/run/a b:c"] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
    }
    let wrong = ["", "tcp", "tcp:", "tcp:host", "tcp:host:", "tcp::1", "tcp:h:65536", "tcp:h:+1", "tcp:h:-1", "tcp:::1:5", "tcp:[::1:5"];
    for text in wrong.into_iter().chain(["unix:", "unix:a\0b", "/a", "udp:h:1", "tcp:[]:1", "tcp:[::1]5"]) {
        assert!(text.parse::<Address>().is_err(), "{text}");
    }
}

#[test]
fn bytes_arrive_in_order_both_ways() {
    let (_directory, addresses) = both_kinds();
    for address in addresses {
        let ((client, _), (server, _)) = pair(&address);
        client.limit_unsent(64 << 10).unwrap();
        server.set_buffer_sizes(128 << 10, 128 << 10).unwrap();
        let (mut client_reader, mut client_writer) = client.split();
        let (mut server_reader, mut server_writer) = server.split();
        let sent: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
        thread::scope(|scope| {
            scope.spawn(|| {
                // More pieces than one system call takes, of all lengths.
                let mut rest = sent.as_slice();
                let mut pieces = Vec::new();
                for length in (0..2000).cycle() {
                    let (piece, after) = rest.split_at(rest.len().min(length));
                    pieces.push(IoSlice::new(piece));
                    rest = after;
                    if rest.is_empty() {
                        break;
                    }
                }
                client_writer.write_all_vectored(&pieces, soon()).unwrap();
                let mut answer = [0; 2];
                client_reader.read_exact(&mut answer, soon()).unwrap();
                assert_eq!(&answer, b"ok");
            });
            let mut received = vec![0; sent.len()];
            let mut at = 0;
            for length in [1, 0, 12, 5, 4096, 8192, 8193, 100_000, 1].into_iter().cycle() {
                let end = received.len().min(at + length);
                server_reader.read_exact(&mut received[at..end], soon()).unwrap();
                at = end;
                if at == received.len() {
                    break;
                }
            }
            assert!(received == sent);
            server_writer.write_all(b"ok", soon()).unwrap();
        });
    }
}

#[test]
fn the_end_tells_how_much_had_come() {
    let ((client, _), (server, _)) = pair(&any_port());
    let (mut reader, _writer) = client.split();
    let (_, mut writer) = server.split();
    writer.write_all(b"abcde", soon()).unwrap();
    writer.finish().unwrap();
    let mut bytes = [0; 3];
    reader.read_exact(&mut bytes, soon()).unwrap();
    assert!(matches!(reader.read_exact(&mut bytes, soon()), Err(LinkError::Closed { received: 2, expected: 3 })));
    assert!(matches!(reader.read_exact(&mut bytes, soon()), Err(LinkError::Closed { received: 0, expected: 3 })));
}

#[test]
fn a_long_read_does_not_put_off_what_comes_after_it() {
    const LONG: usize = 2 << 20;
    let (_directory, addresses) = both_kinds();
    for address in addresses {
        let ((client, _), (server, _)) = pair(&address);
        let (mut reader, _keep) = client.split();
        let (_keep_too, mut writer) = server.split();
        thread::scope(|scope| {
            let wake = Wake::new().unwrap();
            let (asked, wanted) = std::sync::mpsc::channel();
            scope.spawn(move || {
                // The reader is behind and waits for much at a time, whatever the pieces are.
                for piece in [LONG - 1, 1, 3] {
                    wanted.recv().unwrap();
                    writer.write_all(&vec![7; piece], soon()).unwrap();
                }
                wanted.recv().unwrap();
                writer.write_all(&[7; 1000], soon()).unwrap();
                writer.finish().unwrap();
            });
            (0..2).for_each(|_| asked.send(()).unwrap());
            reader.read_exact(&mut vec![0; LONG], soon()).unwrap();
            asked.send(()).unwrap();
            assert_eq!(reader.wait(&wake, soon()).unwrap(), Awaited::Readable);
            reader.read_exact(&mut [0; 3], soon()).unwrap();
            asked.send(()).unwrap();
            // Nor does it miss the end for want of more.
            let cut = reader.read_exact(&mut vec![0; LONG], soon());
            assert!(matches!(cut, Err(LinkError::Closed { received: 1000, .. })), "{cut:?}");
        });
    }
}

#[test]
fn an_interrupt_ends_reading_writing_and_accepting() {
    let (_directory, addresses) = both_kinds();
    for address in addresses {
        let ((client, here), (server, there)) = pair(&address);
        let (mut reader, _keep) = client.split();
        let (_keep_too, mut writer) = server.split();
        thread::scope(|scope| {
            // Nobody reads more than the first byte, so this fills the buffers and waits.
            let writing = scope.spawn(move || writer.write_all(&vec![0; 64 << 20], None));
            reader.read_exact(&mut [0; 1], soon()).unwrap();
            there.raise();
            assert!(matches!(writing.join().unwrap(), Err(LinkError::CutShort)));
            let reading = scope.spawn(move || reader.read_exact(&mut vec![0; 64 << 20], None));
            here.raise();
            assert!(matches!(reading.join().unwrap(), Err(LinkError::Interrupted)));
        });
    }
    let (listener, stop) = (Listener::bind(&any_port()).unwrap(), interrupt());
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept(&stop, None).map(|_| ()));
        stop.raise();
        assert!(matches!(accepting.join().unwrap(), Err(TransportError::Interrupted)));
    });
    assert!(!stop.sleep_until(Instant::now() + Duration::from_secs(100)));
}

#[test]
fn an_interrupted_write_leaves_no_half_message_where_it_can() {
    const LONG: usize = 64 << 20;
    let (_directory, addresses) = both_kinds();
    for address in addresses {
        let ((client, _here), (server, there)) = pair(&address);
        let (mut reader, _keep) = client.split();
        let (_keep_too, mut writer) = server.split();
        let mut writer = thread::scope(|scope| {
            let writing = scope.spawn(move || (writer.write_all(&vec![0; LONG], None), writer));
            reader.read_exact(&mut [0; 1], soon()).unwrap();
            there.raise();
            reader.read_exact(&mut vec![0; LONG - 1], soon()).unwrap();
            let (written, writer) = writing.join().unwrap();
            written.unwrap();
            writer
        });
        assert!(matches!(writer.write_all(b"next", None), Err(LinkError::Interrupted)));
        let mut last = [0; 3];
        writer.interrupted_by(&interrupt()).write_all(b"end", soon()).unwrap();
        reader.read_exact(&mut last, soon()).unwrap();
        assert_eq!(&last, b"end");
    }
}

#[test]
fn deadlines_end_every_wait() {
    let near = || Some(Instant::now() + Duration::from_millis(5));
    let ((client, _here), (_server, _there)) = pair(&any_port());
    let (mut reader, mut writer) = client.split();
    assert!(matches!(reader.read_exact(&mut [0; 1], near()), Err(LinkError::TimedOut)));
    assert!(matches!(writer.write_all(&vec![0; 64 << 20], near()), Err(LinkError::TimedOut)));
    let listener = Listener::bind(&any_port()).unwrap();
    assert!(matches!(listener.accept(&interrupt(), near()), Err(TransportError::TimedOut(_))));
    assert!(interrupt().sleep_until(Instant::now() + Duration::from_millis(1)));
}

#[test]
fn a_closer_ends_both_sides() {
    let ((client, _here), (server, _there)) = pair(&any_port());
    let closer = client.closer();
    let (mut reader, mut writer) = client.split();
    let (mut far_reader, _far_writer) = server.split();
    thread::scope(|scope| {
        let near = scope.spawn(move || reader.read_exact(&mut [0; 1], soon()));
        let far = scope.spawn(move || far_reader.read_exact(&mut [0; 1], soon()));
        closer.shutdown();
        assert!(matches!(near.join().unwrap(), Err(LinkError::Closed { .. })));
        assert!(matches!(far.join().unwrap(), Err(LinkError::Closed { .. })));
    });
    assert!(matches!(writer.write_all(b"x", soon()), Err(LinkError::Io(_))));
}

#[test]
fn unix_sockets_leave_no_files_and_take_no_live_ones() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let address = Address::Unix(path.clone());
    let listener = Listener::bind(&address).unwrap();
    assert!(matches!(Listener::bind(&address), Err(TransportError::Live(_))));
    drop(listener);
    assert!(!path.exists());
    // Left behind by a process that was killed.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&address).unwrap();
    fs::remove_file(&path).unwrap();
    let successor = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists(), "the successor's file is not ours");
    drop(successor);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    assert!(matches!(Listener::bind(&address), Err(TransportError::NotASocket(_))));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn failures_say_where() {
    let listener = Listener::bind(&any_port()).unwrap();
    let address = listener.address().clone();
    let busy = Listener::bind(&address).unwrap_err().to_string();
    assert!(busy.starts_with(&format!("cannot listen on {address}: Address already in use")), "{busy}");
    drop(listener);
    let refused = connect(&address, &interrupt(), soon()).unwrap_err().to_string();
    assert!(refused.starts_with(&format!("cannot connect to {address}: Connection refused")), "{refused}");
    let missing = connect(&"unix:/nonexistent/socket".parse().unwrap(), &interrupt(), soon()).unwrap_err().to_string();
    assert!(missing.starts_with("cannot connect to unix:/nonexistent/socket: No such file"), "{missing}");
    let long = Address::Unix("/x".repeat(100).into());
    assert!(matches!(Listener::bind(&long), Err(TransportError::Listen { .. })));
}
