//! A link that can be cut: connections to it are passed on to another address.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// Passes connections on until it is cut.
pub struct Proxy {
    pub address: String,
    streams: Arc<Mutex<Option<Vec<TcpStream>>>>,
    /// What went to the target and what came from it, for each connection in the order of their opening, if it is kept.
    recorded: Option<Recorded>,
}

type Recorded = Arc<Mutex<Vec<[Vec<u8>; 2]>>>;

impl Proxy {
    /// Passes what comes to its own address on to `target`, `tcp:HOST:PORT`.
    pub fn to(target: &str) -> Self {
        Self::new(target, None)
    }

    /// Keeps what passes.
    pub fn recording(target: &str) -> Self {
        Self::new(target, Some(Recorded::default()))
    }

    pub fn recorded(&self) -> Vec<[Vec<u8>; 2]> {
        self.recorded.as_ref().map(|recorded| recorded.lock().unwrap().clone()).unwrap_or_default()
    }

    fn new(target: &str, recorded: Option<Recorded>) -> Self {
        let target = target.strip_prefix("tcp:").unwrap().to_string();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let streams = Arc::new(Mutex::new(Some(Vec::new())));
        let (open, records) = (streams.clone(), recorded.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for index in 0.. {
                let Ok((near, _)) = listener.accept() else { return };
                if let Some(records) = &records {
                    records.lock().unwrap().push(Default::default());
                }
                let Ok(far) = TcpStream::connect(&target) else { continue };
                match &mut *open.lock().unwrap() {
                    Some(open) => open.extend([near.try_clone().unwrap(), far.try_clone().unwrap()]),
                    None => continue,
                }
                let directions = [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)];
                for (direction, (mut from, mut to)) in directions.into_iter().enumerate() {
                    let records = records.clone();
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(length @ 1..) = from.read(&mut buffer) {
                            if let Some(records) = &records {
                                records.lock().unwrap()[index][direction].extend(&buffer[..length]);
                            }
                            if to.write_all(&buffer[..length]).is_err() {
                                break;
                            }
                        }
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Proxy { address, streams, recorded }
    }

    /// Cuts all connections, now and for ever, whatever is on its way.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().take().into_iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
