//! A link that can be cut: connections to it are passed on to another address.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// Passes connections on until it is cut.
pub struct Proxy {
    pub address: String,
    streams: Arc<Mutex<Option<Vec<TcpStream>>>>,
}

impl Proxy {
    /// Passes what comes to its own address on to `target`, `tcp:HOST:PORT`.
    pub fn to(target: &str) -> Self {
        let target = target.strip_prefix("tcp:").unwrap().to_string();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let streams = Arc::new(Mutex::new(Some(Vec::new())));
        let open = streams.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                match &mut *open.lock().unwrap() {
                    Some(open) => open.extend([near.try_clone().unwrap(), far.try_clone().unwrap()]),
                    None => continue,
                }
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(length @ 1..) = from.read(&mut buffer) {
                            if to.write_all(&buffer[..length]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Proxy { address, streams }
    }

    /// Cuts all connections, now and for ever, whatever is on its way.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().take().into_iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
