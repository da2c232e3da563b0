//! A unix socket before another: what the server behind it says is held back after so many bytes, until the test lets it through.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::output::LIMIT;

/// One connection's gate.
pub struct Gate {
    reached: Receiver<()>,
    open: Sender<()>,
}

impl Gate {
    /// Listens at `path` for those who want the server at `server`, and holds the first that has been told `bytes`.
    pub fn before(server: &Path, path: &Path, bytes: usize) -> Gate {
        let listener = UnixListener::bind(path).unwrap();
        let server = server.to_owned();
        let (reaches, reached) = channel();
        let (open, opened) = channel::<()>();
        std::thread::spawn(move || {
            let mut opened = Some(opened);
            // A client that only looks whether anybody listens is told less.
            while opened.is_some() {
                let (client, _) = listener.accept().unwrap();
                let Ok(server) = UnixStream::connect(&server) else { continue };
                let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
                pass(server, client, bytes, &reaches, &mut opened);
            }
        });
        Gate { reached, open }
    }

    /// Waits until it is reached.
    pub fn is_reached(&self) {
        self.reached.recv_timeout(LIMIT).unwrap();
    }

    /// Lets everything through.
    pub fn opens(self) {
        drop(self.open);
    }
}

fn pass(mut from: UnixStream, mut to: UnixStream, bytes: usize, reaches: &Sender<()>, opened: &mut Option<Receiver<()>>) {
    let mut buffer = [0; 65536];
    let mut passed = 0;
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        passed += count;
        if passed >= bytes
            && let Some(opened) = opened.take()
        {
            reaches.send(()).unwrap();
            // An error is how it opens.
            let _ = opened.recv();
        }
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}
