//! The host's side of a guest's serial console.

mod escape;
mod terminal;
mod unix;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;

use crossbeam_channel::bounded;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use thiserror::Error;

use super::serial::SerialTarget;
use crate::qmp::socket::{PathListener, SocketError};
use escape::{Escape, Input};
use terminal::RawTerminal;
pub use terminal::restore as restore_terminal;
use unix::UnixConsole;

/// How many reads of typed input may wait for a guest that takes none.
const TYPE_AHEAD: usize = 256;

/// Why a console could not be opened.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// A file.
    #[error("cannot write the serial console to {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A socket.
    #[error("serial console: {0}")]
    Socket(#[from] SocketError),
    /// Standard input or output.
    #[error("cannot use the terminal as serial console: {0}")]
    Terminal(std::io::Error),
}

/// An open console. Dropping it ends the input, restores the terminal and removes the socket.
pub struct Console {
    backend: Backend,
    // After the backend: nothing reads in raw mode any more when the mode is restored.
    _terminal: Option<RawTerminal>,
}

enum Backend {
    Stdio { input: Option<InputStop> },
    Null,
    File(File),
    Unix(UnixConsole),
}

/// Ends the thread that reads standard input, when dropped.
struct InputStop(OwnedFd);

impl Console {
    /// Opens `target`. With stdio, a terminal goes into raw mode.
    pub fn open(target: &SerialTarget) -> Result<Self, ConsoleError> {
        let mut terminal = None;
        let backend = match target {
            SerialTarget::Null => Backend::Null,
            SerialTarget::File(path) => {
                Backend::File(File::create(path).map_err(|source| ConsoleError::File { path: path.clone(), source })?)
            }
            SerialTarget::Unix(path) => Backend::Unix(UnixConsole::new(PathListener::bind(path)?)),
            SerialTarget::Stdio => {
                terminal = RawTerminal::enter().map_err(ConsoleError::Terminal)?;
                Backend::Stdio { input: None }
            }
        };
        Ok(Console { backend, _terminal: terminal })
    }

    /// Where the guest's output goes, unbuffered. A terminal or pipe that is full holds the guest back; a socket's client that does
    /// not read is disconnected.
    pub fn output(&self) -> Result<Box<dyn Write + Send>, ConsoleError> {
        match &self.backend {
            Backend::Null => Ok(Box::new(std::io::sink())),
            // Not std's Stdout, which keeps lines back that have no end yet.
            Backend::Stdio { .. } => Ok(Box::new(duplicate(&std::io::stdout())?)),
            Backend::File(file) => Ok(Box::new(duplicate(file)?)),
            Backend::Unix(console) => Ok(Box::new(console.output())),
        }
    }

    /// Hands what a person types to `receive` from a thread of its own. While `receive` waits because the guest takes no more, little more
    /// is read. On stdio, each Ctrl-A X calls `quit`. The end of the input is not the end of the guest.
    pub fn start_input(&mut self, receive: impl Fn(&[u8]) + Send + 'static, quit: impl Fn() + Send + 'static) -> Result<(), ConsoleError> {
        match &mut self.backend {
            Backend::Null | Backend::File(_) => Ok(()),
            Backend::Unix(console) => console.start(receive).map_err(ConsoleError::Terminal),
            Backend::Stdio { input } => {
                let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| ConsoleError::Terminal(errno.into()))?;
                let stopped = stop.try_clone().map_err(ConsoleError::Terminal)?;
                let stdin = duplicate(&std::io::stdin())?;
                let (typed, to_guest) = bounded::<Vec<u8>>(TYPE_AHEAD);
                let spawn = |name: &str| thread::Builder::new().name(name.into());
                // Apart, so that Ctrl-A X is seen also when a paused guest takes nothing.
                spawn("console-guest").spawn(move || to_guest.iter().for_each(|bytes| receive(&bytes))).map_err(ConsoleError::Terminal)?;
                // Fails only when the other thread has panicked.
                let receive = move |bytes: &[u8]| drop(typed.send(bytes.to_vec()));
                spawn("console").spawn(move || pump(stdin, &stopped, &receive, &quit)).map_err(ConsoleError::Terminal)?;
                *input = Some(InputStop(stop));
                Ok(())
            }
        }
    }
}

impl Drop for InputStop {
    fn drop(&mut self) {
        // The thread is not waited for: it may be held up by the guest, and ends as soon as it looks for input again.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

fn duplicate(file: &impl AsFd) -> Result<File, ConsoleError> {
    file.as_fd().try_clone_to_owned().map(File::from).map_err(ConsoleError::Terminal)
}

fn pump(mut input: File, stop: &OwnedFd, receive: &dyn Fn(&[u8]), quit: &dyn Fn()) {
    let mut escape = Escape::default();
    let mut buffer = [0; 256];
    loop {
        let mut waiting = [PollFd::new(&input, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut waiting, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) if waiting.last().is_some_and(|stop| !stop.revents().is_empty()) => return,
            Ok(_) => {}
        }
        let typed = match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) if matches!(error.kind(), std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock) => continue,
            Err(_) => return,
        };
        let mut for_guest = Vec::with_capacity(typed.len());
        for byte in typed {
            match escape.push(*byte) {
                Input::Guest(byte) => for_guest.push(byte),
                Input::Nothing => {}
                Input::Help => eprint!("{}", escape::HELP),
                Input::Quit => quit(),
            }
        }
        if !for_guest.is_empty() {
            receive(&for_guest);
        }
    }
}

#[cfg(test)]
mod tests;
