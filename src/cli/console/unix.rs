//! A console over a listening unix socket, one client at a time.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::qmp::socket::PathListener;

/// A client that takes no output for this long is disconnected: it must not hold the guest back for good.
const WRITE_LIMIT: Duration = Duration::from_secs(1);

/// The client of the moment.
type Current = Arc<Mutex<Option<Arc<UnixStream>>>>;

/// A listening console.
pub(super) struct UnixConsole {
    listener: Arc<PathListener>,
    current: Current,
}

/// Writes to the client of the moment; without one the output is lost.
pub(super) struct UnixOutput(Current);

impl UnixConsole {
    pub fn new(listener: PathListener) -> Self {
        UnixConsole { listener: Arc::new(listener), current: Current::default() }
    }

    pub fn output(&self) -> UnixOutput {
        UnixOutput(self.current.clone())
    }

    /// Takes one client after the other and hands what it sends to `receive`.
    pub fn start(&self, receive: impl Fn(&[u8]) + Send + 'static) -> std::io::Result<()> {
        let (listener, current) = (self.listener.clone(), self.current.clone());
        thread::Builder::new().name("console".into()).spawn(move || {
            while let Ok(stream) = listener.accept() {
                let stream = Arc::new(stream);
                if stream.set_write_timeout(Some(WRITE_LIMIT)).is_ok() {
                    set(&current, Some(stream.clone()));
                    receive_all(&stream, &receive);
                    set(&current, None);
                }
            }
        })?;
        Ok(())
    }
}

impl Drop for UnixConsole {
    fn drop(&mut self) {
        // First no new clients, then the end of the one that is there: the thread finds both and ends.
        self.listener.close();
        if let Some(stream) = get(&self.current) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Write for UnixOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let Some(stream) = get(&self.0) else { return Ok(bytes.len()) };
        match (&*stream).write(bytes) {
            // Not tried again here: each try has the whole limit, and whoever kicks the writer again and again wants an end.
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                // The reading thread notices and takes the next client.
                let _ = stream.shutdown(Shutdown::Both);
                Ok(bytes.len())
            }
            result => result,
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn receive_all(mut stream: &UnixStream, receive: &dyn Fn(&[u8])) {
    let mut buffer = [0; 256];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => receive(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn get(current: &Current) -> Option<Arc<UnixStream>> {
    current.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn set(current: &Current, stream: Option<Arc<UnixStream>>) {
    *current.lock().unwrap_or_else(PoisonError::into_inner) = stream;
}
