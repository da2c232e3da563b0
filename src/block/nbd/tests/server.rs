//! Over sockets, with threads.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::*;
use crate::block::nbd::catalogue::{ExportError, RemoveMode};
use crate::block::nbd::server::{NbdServer, ServerAddress, ServerError};

const LIMIT: Duration = Duration::from_secs(30);

struct Served {
    bench: Bench,
    server: NbdServer,
    deleted: mpsc::Receiver<String>,
    path: PathBuf,
}

impl Served {
    fn new(max_connections: Option<usize>) -> Self {
        let bench = Bench::new();
        let path = bench.directory.path().join("nbd");
        let (sender, deleted) = mpsc::channel();
        let server = NbdServer::new(move |id| sender.send(id.to_owned()).unwrap());
        server.start(&ServerAddress::Unix { path: path.clone() }, max_connections).unwrap();
        server.add(bench.export(false)).unwrap();
        Served { bench, server, deleted, path }
    }

    fn connect(&self) -> UnixStream {
        connect(&self.path)
    }

    /// A client in its transmission.
    fn client(&self) -> UnixStream {
        let mut stream = self.connect();
        stream.write_all(&[hello(3), option(option::GO, &info_request("read", &[]))].concat()).unwrap();
        // Greeting, two facts, acknowledgement.
        stream.read_exact(&mut [0; 18 + 20 + 12 + 20 + 14 + 20]).unwrap();
        stream
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn reads(stream: &mut UnixStream) -> bool {
    let request = Request { flags: 0, command: command::READ, cookie: 1, offset: 0, length: 512 }.encode();
    stream.write_all(&request).is_ok() && stream.read_exact(&mut [0; 16 + 512]).is_ok()
}

/// The server hangs up; whatever it has said before is passed over.
fn assert_disconnected(stream: &mut UnixStream) {
    match io::copy(stream, &mut io::sink()) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn silent_and_slow_clients_delay_nobody_and_silent_ones_are_let_go() {
    let served = Served::new(None);
    let (mut silent, mut slow) = (served.connect(), served.client());
    let began = Instant::now();
    // Answers that nobody reads, far more than the socket holds.
    let request = Request { flags: 0, command: command::READ, cookie: 1, offset: 0, length: 4 << 20 }.encode();
    slow.write_all(&request.repeat(100)).unwrap();
    assert!(reads(&mut served.client()));
    assert_disconnected(&mut silent);
    assert!(began.elapsed() < LIMIT / 2);
    drop(slow);
}

#[test]
fn no_more_clients_than_were_asked_for_are_served_at_a_time() {
    let served = Served::new(Some(1));
    let mut first = served.client();
    let mut second = served.connect();
    second.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert_eq!(second.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert!(reads(&mut first));
    drop(first);
    second.set_read_timeout(Some(LIMIT)).unwrap();
    second.read_exact(&mut [0; 18]).unwrap();
}

#[test]
fn an_export_in_use_is_removed_the_hard_way_only() {
    let served = Served::new(None);
    let mut client = served.client();
    let in_use = served.server.remove("id-read", RemoveMode::Safe).unwrap_err();
    assert!(matches!(in_use, ServerError::Export(ExportError::StillInUse(_))), "{in_use}");
    assert!(reads(&mut client));
    served.server.remove("id-read", RemoveMode::Hard).unwrap();
    assert_eq!(served.deleted.recv_timeout(LIMIT).unwrap(), "id-read");
    assert_disconnected(&mut client);
    assert!(served.server.exports().is_empty());
    assert_eq!(served.server.remove("id-read", RemoveMode::Hard).unwrap_err().to_string(), "Export 'id-read' is not found");
    // It can be there again.
    served.server.add(served.bench.export(false)).unwrap();
    assert!(reads(&mut served.client()));
}

#[test]
fn the_end_of_the_server_is_the_end_of_clients_and_exports() {
    let served = Served::new(None);
    assert!(matches!(served.server.start(&ServerAddress::Unix { path: served.path.clone() }, None), Err(ServerError::Running)));
    let (mut client, mut silent) = (served.client(), served.connect());
    served.server.stop().unwrap();
    assert_eq!(served.deleted.recv_timeout(LIMIT).unwrap(), "id-read");
    assert_disconnected(&mut client);
    assert_disconnected(&mut silent);
    assert!(!served.path.exists());
    assert!(matches!(served.server.stop(), Err(ServerError::NotRunning)));
    assert!(matches!(served.server.add(served.bench.export(false)), Err(ServerError::NotRunning)));
    served.server.start(&ServerAddress::Unix { path: served.path.clone() }, None).unwrap();
    served.server.add(served.bench.export(false)).unwrap();
    assert!(reads(&mut served.client()));
}

#[test]
fn ids_and_names_are_unique() {
    let served = Served::new(None);
    let add = |export: Export| served.server.add(export).unwrap_err().to_string();
    assert_eq!(add(Export { name: "other".into(), ..served.bench.export(false) }), "Block export id 'id-read' is already in use");
    assert_eq!(add(Export { id: "other".into(), ..served.bench.export(false) }), "NBD server already has export named 'read'");
    let long = "x".repeat(4097);
    assert!(add(Export { name: long.clone(), ..served.bench.export(true) }).ends_with("too long"));
    assert!(add(Export { description: Some(long), ..served.bench.export(true) }).ends_with("too long"));
}

#[test]
fn giving_the_disk_up_waits_for_a_request_and_refuses_the_next() {
    let bench = Bench::new();
    let (entered, inside) = mpsc::channel();
    let (leave, left) = mpsc::channel::<()>();
    let disk = bench.disk.clone();
    let request = std::thread::spawn(move || {
        disk.with_io(|io| {
            entered.send(()).unwrap();
            left.recv().unwrap();
            io.flush()
        })
    });
    inside.recv_timeout(LIMIT).unwrap();
    let disk = bench.disk.clone();
    let (released, release) = mpsc::channel();
    std::thread::spawn(move || released.send(disk.release()).unwrap());
    assert!(release.recv_timeout(Duration::from_millis(100)).is_err(), "given up under a request");
    leave.send(()).unwrap();
    release.recv_timeout(LIMIT).unwrap().unwrap();
    request.join().unwrap().unwrap();
    let refused = bench.disk.with_io(|_| Ok(())).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ESHUTDOWN));
}

#[test]
fn deleted_is_told_once_for_each() {
    let bench = Bench::new();
    let session = bench.session("read", false);
    bench.catalogue.remove_all();
    assert_eq!(*bench.deleted.lock().unwrap(), ["id-write"]);
    assert!(bench.catalogue.info()[0].shutting_down && bench.catalogue.find("read").is_none());
    assert!(matches!(bench.catalogue.remove("id-read", RemoveMode::Hard), Err(ExportError::ShuttingDown(_))));
    drop(session);
    assert_eq!(*bench.deleted.lock().unwrap(), ["id-write", "id-read"]);
}
