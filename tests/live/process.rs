//! Child processes: ended by their own handle at the latest when it is dropped.

use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::output::{Output, readable};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Status(i32),
    Killed,
}

/// A Ferry process of any kind.
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    stdin: ChildStdin,
    pub stdout: Option<Output>,
    pub stderr: Output,
}

impl Process {
    /// Starts `ferry` with `arguments`.
    pub fn ferry(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferry"));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = child.stdout.take().map(Output::new);
        let stderr = Output::new(child.stderr.take().unwrap());
        Process { child, pidfd, stdin, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it does within `limit`.
    pub fn ends_within(&mut self, limit: Duration) -> Option<End> {
        if !readable(&self.pidfd, Instant::now() + limit) {
            return None;
        }
        Some(self.child.wait().unwrap().code().map_or(End::Killed, End::Status))
    }

    /// Types on its standard input; lost if it has ended.
    pub fn types(&mut self, text: &str) {
        let _ = self.stdin.write_all(text.as_bytes());
    }

    /// SIGKILL, at once.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only where the process has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.stderr.text_so_far();
        if std::thread::panicking() {
            eprintln!("process {} ({}) said:\n{said}", self.child.id(), self.child.wait().map_or("?".into(), |status| status.to_string()));
        } else {
            assert!(!said.contains("panicked"), "a Ferry panicked:\n{said}");
        }
    }
}
