//! A client that sends what it is told, byte by byte if need be, and waits with a time limit.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

pub const LIMIT: Duration = Duration::from_secs(20);

pub struct RawClient {
    pub stream: BufReader<UnixStream>,
}

impl RawClient {
    /// Connects and reads the greeting.
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        let mut client = RawClient { stream: BufReader::new(stream) };
        let greeting = client.read();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64() && greeting["QMP"]["capabilities"].is_array(), "{greeting}");
        client
    }

    /// Connects and negotiates.
    pub fn negotiated(path: &Path) -> Self {
        let mut client = Self::connect(path);
        assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#), serde_json::json!({ "return": {} }));
        client
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next message; `Null` at the end of the connection.
    pub fn read(&mut self) -> Value {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Value::Null,
            Ok(_) => serde_json::from_str(&line).unwrap(),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Value::Null,
            Err(error) => panic!("no message within {LIMIT:?}: {error}"),
        }
    }

    /// Sends a command and gives the next message.
    pub fn ask(&mut self, command: impl AsRef<[u8]>) -> Value {
        self.send(command);
        self.read()
    }
}
