//! A listening unix socket with a path that is private, replaced when stale, and removed in the end.

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

/// How long to leave the system alone when it has no file descriptor or memory for a client.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Why a socket could not be made.
#[derive(Debug, Error)]
pub enum SocketError {
    /// A process accepts connections there.
    #[error("{} is in use by another process; choose another path or end that process", .0.display())]
    InUse(PathBuf),
    /// There is something that is not a socket.
    #[error("{} exists and is not a socket; choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {}: {source}", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A listening unix socket that only its owner can connect to. Dropping it removes the path.
#[derive(Debug)]
pub struct PathListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the path, so as not to remove somebody else's.
    identity: Option<(u64, u64)>,
    closed: AtomicBool,
}

impl PathListener {
    /// Listens at `path`, replacing a socket there that nobody listens on any more.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        remove_stale(path)?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(|errno| failed(errno.into()))?;
        // Before bind: Linux takes the new file's mode from the socket's, so that at no time anybody else can connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|errno| failed(errno.into()))?;
        match rustix::net::bind(&socket, &address) {
            Err(rustix::io::Errno::ADDRINUSE) => return Err(SocketError::InUse(path.to_owned())),
            result => result.map_err(|errno| failed(errno.into()))?,
        }
        let listener =
            PathListener { listener: socket.into(), path: path.to_owned(), identity: identify(path), closed: AtomicBool::new(false) };
        rustix::net::listen(&listener.listener, 16).map_err(|errno| failed(errno.into()))?;
        Ok(listener)
    }

    /// Waits for the next client; an error once [`PathListener::close`] was called.
    pub fn accept(&self) -> std::io::Result<UnixStream> {
        loop {
            match self.listener.accept() {
                Err(error) if is_transient(&error) => std::thread::sleep(RETRY_PAUSE),
                accepted => return accepted.map(|(stream, _)| stream),
            }
        }
    }

    /// Removes the path and makes [`PathListener::accept`] fail, now and from now on, also where it waits in another thread.
    pub fn close(&self) {
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        // Once only: later the path may be another's, and file systems give inodes away again.
        let first = !self.closed.swap(true, Ordering::Relaxed);
        if first && self.identity.is_some() && identify(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for PathListener {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether accepting again can work: the client was gone already, or another must first give back a file descriptor.
pub(crate) fn is_transient(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let transient = [Errno::CONNABORTED, Errno::INTR, Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| transient.contains(&errno))
}

fn identify(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| SocketError::Listen { path: path.to_owned(), source })
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn path_is_private_refused_while_in_use_and_removed_in_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = PathListener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(PathListener::bind(&path), Err(SocketError::InUse(_))));
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn stale_socket_is_replaced_but_no_other_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        PathListener::bind(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(PathListener::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn another_process_s_socket_at_the_path_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = PathListener::bind(&path).unwrap();
        std::fs::rename(&path, directory.path().join("moved")).unwrap();
        let _second = PathListener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn closing_ends_a_waiting_accept() {
        let directory = tempfile::tempdir().unwrap();
        let listener = Arc::new(PathListener::bind(&directory.path().join("socket")).unwrap());
        let waiting = std::thread::spawn({
            let listener = listener.clone();
            move || listener.accept().is_err()
        });
        listener.close();
        assert!(!listener.path.exists(), "the path must not wait for the other thread");
        assert!(waiting.join().unwrap());
    }

    #[test]
    fn path_that_is_too_long_or_has_no_directory_is_an_error() {
        for path in [PathBuf::from("/tmp/".to_string() + &"x".repeat(200)), PathBuf::from("/nonexistent/socket")] {
            let error = PathListener::bind(&path).unwrap_err().to_string();
            assert!(error.starts_with("cannot listen on /"), "{error}");
        }
    }
}
