use std::sync::mpsc::channel;
use std::time::Duration;

use std::os::unix::net::UnixStream;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn file_gets_the_output_without_delay() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let console = Console::open(&SerialTarget::File(path.clone())).unwrap();
    console.output().unwrap().write_all(b"no line end").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"no line end");
    let nowhere = SerialTarget::File("/nonexistent/log".into());
    assert!(Console::open(&nowhere).err().unwrap().to_string().contains("/nonexistent/log"));
}

#[test]
fn socket_serves_one_client_after_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let mut console = Console::open(&SerialTarget::Unix(path.clone())).unwrap();
    let mut output = console.output().unwrap();
    output.write_all(b"nobody hears this").unwrap();
    let (sender, received) = channel();
    console.start_input(move |bytes| sender.send(bytes.to_vec()).unwrap(), || {}).unwrap();
    for round in [b'1', b'2'] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.write_all(&[round]).unwrap();
        assert_eq!(received.recv_timeout(LIMIT).unwrap(), [round]);
        output.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        client.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
    }
    drop(console);
    assert!(received.recv_timeout(LIMIT).is_err(), "the input must end with the console");
    assert!(!path.exists());
}

#[test]
fn socket_client_that_does_not_read_is_disconnected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let mut console = Console::open(&SerialTarget::Unix(path.clone())).unwrap();
    let (sender, received) = channel();
    console.start_input(move |bytes| sender.send(bytes.to_vec()).unwrap(), || {}).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    received.recv_timeout(LIMIT).unwrap();
    // Far more than the socket's buffer: held back once, for the limit, and then no more.
    console.output().unwrap().write_all(&vec![b'o'; 16 << 20]).unwrap();
    let mut rest = Vec::new();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 16 << 20);
}

#[test]
fn pipe_is_pumped_with_escapes_until_it_ends() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (sender, received) = channel();
    let thread = thread::spawn(move || {
        let input = File::from(OwnedFd::from(reader));
        pump(input, &stop, &move |bytes| sender.send(bytes.to_vec()).unwrap(), &|| panic!("nobody typed Ctrl-A X"));
    });
    writer.write_all(b"ls\x01\x01\n").unwrap();
    drop(writer);
    let typed: Vec<u8> = received.into_iter().flatten().collect();
    assert_eq!(typed, b"ls\x01\n");
    thread.join().unwrap();
}

#[test]
fn each_ctrl_a_x_is_heard_and_the_stop_event_ends_the_pump() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let stopped = stop.try_clone().unwrap();
    let (sender, quit) = channel();
    let thread = thread::spawn(move || {
        let input = File::from(OwnedFd::from(reader));
        pump(input, &stopped, &|_| panic!("nothing is for the guest"), &move || sender.send(()).unwrap());
    });
    for _ in 0..2 {
        writer.write_all(b"\x01x").unwrap();
        quit.recv_timeout(LIMIT).unwrap();
    }
    rustix::io::write(&stop, &1_u64.to_ne_bytes()).unwrap();
    thread.join().unwrap();
}
