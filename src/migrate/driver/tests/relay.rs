//! A wire between source and destination that can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::hosts::PAGE_CHANNELS;
use crate::migrate::transport::Address;

/// Passes bytes on in both directions until it is cut.
pub struct Relay {
    pub address: Address,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    /// A relay to the TCP address `target`.
    pub fn to(target: &Address) -> Self {
        let Address::Tcp { host, port } = target.clone() else { panic!("not a TCP address") };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
        let open: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let ours = open.clone();
        std::thread::spawn(move || {
            for _ in 0..2 + PAGE_CHANNELS {
                let Ok((near, _)) = listener.accept() else { return };
                let far = TcpStream::connect((host.as_str(), port)).unwrap();
                ours.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                    from.set_nodelay(true).unwrap();
                    std::thread::spawn(move || {
                        let mut buffer = [0; 16 << 10];
                        while let Ok(count) = from.read(&mut buffer)
                            && count > 0
                            && to.write_all(&buffer[..count]).is_ok()
                        {}
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Relay { address, open }
    }

    pub fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
