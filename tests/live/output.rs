//! What a process says, read when somebody looks, so that nothing said before a moment is ever seen as said after it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longest wait for anything that is not said to take longer.
pub const LIMIT: Duration = Duration::from_secs(90);

/// Waits until `descriptor` is readable; false at the deadline.
pub fn readable(descriptor: &OwnedFd, deadline: Instant) -> bool {
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
        match poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// What a read brought.
#[derive(Debug, PartialEq, Eq)]
pub enum More {
    Bytes,
    End,
    /// Nothing until the deadline.
    Nothing,
}

/// A pipe from a process and everything it has brought.
pub struct Output {
    pipe: OwnedFd,
    pub bytes: Vec<u8>,
}

impl Output {
    pub fn new(pipe: impl Into<OwnedFd>) -> Self {
        Output { pipe: pipe.into(), bytes: Vec::new() }
    }

    /// Makes the pipe hold as little as it can, and says how much that is.
    pub fn narrow(&self) -> u64 {
        rustix::pipe::fcntl_setpipe_size(&self.pipe, 1).unwrap() as u64
    }

    /// How many bytes wait in the pipe.
    pub fn unread(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.pipe).unwrap()
    }

    /// Waits for more, until `deadline`.
    pub fn more(&mut self, deadline: Instant) -> More {
        if !readable(&self.pipe, deadline) {
            return More::Nothing;
        }
        let mut buffer = [0; 65536];
        match rustix::io::read(&self.pipe, &mut buffer).unwrap() {
            0 => More::End,
            length => {
                self.bytes.extend_from_slice(&buffer[..length]);
                More::Bytes
            }
        }
    }

    /// Everything said until now.
    pub fn text_so_far(&mut self) -> String {
        while self.more(Instant::now()) == More::Bytes {}
        self.text()
    }

    /// Everything said until the process has ended.
    pub fn text_to_end(&mut self) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.more(deadline) {
                More::Bytes => {}
                More::End => return self.text(),
                More::Nothing => panic!("no end of the output after:\n{}", self.text()),
            }
        }
    }

    /// Waits until `words` have been said, and gives all that was said.
    pub fn wait_for(&mut self, words: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        while !self.text().contains(words) {
            let more = self.more(deadline);
            assert_eq!(more, More::Bytes, "{words:?} was not said, but:\n{}", self.text());
        }
        self.text()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}
