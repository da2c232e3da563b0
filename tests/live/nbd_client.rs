//! Clients of an export: the tools that Debian has, and one that says what no tool would.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use ferry::block::nbd::protocol::{Fields, IHAVEOPT, Request, SIMPLE_REPLY_MAGIC, command, option};

use super::output::LIMIT;

/// Runs a client that must succeed; its stdout.
pub fn tool(name: &str, arguments: &[&dyn AsRef<OsStr>]) -> String {
    let package = if name.starts_with("nbd") { "libnbd-bin" } else { "qemu-utils" };
    let output = Command::new(name).args(arguments.iter().map(AsRef::as_ref)).output();
    let output = output.unwrap_or_else(|error| panic!("{name}: {error}; this test needs the Debian package {package}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {}: {said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// The extents of `nbdinfo --map`: offset, length and type, one behind the other up to `size`.
pub fn map(uri: &str, context: &str, size: u64) -> Vec<(u64, u64, u64)> {
    let text = tool("nbdinfo", &[&format!("--map={context}"), &"--json", &uri]);
    let extents: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap();
    let extents: Vec<_> =
        extents.iter().map(|extent| (number(extent, "offset"), number(extent, "length"), number(extent, "type"))).collect();
    let end = extents.iter().fold(0, |at, (offset, length, _)| {
        assert_eq!(at, *offset, "{extents:?}");
        offset + length
    });
    assert_eq!(end, size);
    extents
}

/// A connection with simple replies, in its transmission.
pub struct RawClient(UnixStream);

/// How a request ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    Error(u32),
    Disconnected,
}

/// Connects, and says no more than the client's flags.
pub fn connect(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream
}

impl RawClient {
    pub fn connect(socket: &Path, name: &str) -> Self {
        let mut stream = connect(socket);
        let head = [&IHAVEOPT.to_be_bytes()[..], &option::EXPORT_NAME.to_be_bytes(), &(name.len() as u32).to_be_bytes()];
        stream.write_all(&[&head.concat(), name.as_bytes()].concat()).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        RawClient(stream)
    }

    /// The connection, for what is no request.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.0
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        let request = Request { flags: 0, command: command::WRITE, cookie: offset, offset, length: data.len() as u32 };
        self.request(&[&request.encode(), data].concat())
    }

    pub fn read(&mut self, offset: u64, target: &mut [u8]) -> Answer {
        let request = Request { flags: 0, command: command::READ, cookie: offset, offset, length: target.len() as u32 };
        match self.request(&request.encode()) {
            Answer::Done if self.0.read_exact(target).is_ok() => Answer::Done,
            Answer::Done => Answer::Disconnected,
            other => other,
        }
    }

    fn request(&mut self, bytes: &[u8]) -> Answer {
        let mut head = [0; 16];
        if self.0.write_all(bytes).and_then(|()| self.0.read_exact(&mut head)).is_err() {
            return Answer::Disconnected;
        }
        let mut fields = Fields(&head);
        assert_eq!(fields.u32(), Some(SIMPLE_REPLY_MAGIC));
        match fields.u32().unwrap() {
            0 => Answer::Done,
            error => Answer::Error(error),
        }
    }
}
