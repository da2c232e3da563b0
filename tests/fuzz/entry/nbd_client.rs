//! The NBD client: a server's bytes, from its greeting to its answers.

use std::io::{self, Read, Write};

use ferry::block::nbd::client::Client;

use super::allocation::{proportionate, within};

/// Says what the input says, and hears nothing.
struct Server<'a>(&'a [u8]);

impl Read for Server<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Server<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub fn run(data: &[u8]) {
    let limit = proportionate(data.len());
    for bitmap in [Some("b"), None] {
        let Ok(mut client) = within(limit, || Client::negotiate(Server(data), "r", bitmap)) else { continue };
        let (mut at, mut buffer) = (0, [0; 4096]);
        // Status and data in turn, until the server says nothing more or something wrong.
        while at < client.size() {
            let Ok(ranges) = within(limit, || client.status(at)) else { break };
            assert!(!ranges.is_empty());
            for (range, _) in ranges {
                assert!(range.start == at && range.end > at && range.end <= client.size());
                at = range.end;
            }
            if within(limit, || client.read(&mut buffer, 0)).is_err() {
                break;
            }
        }
    }
}
