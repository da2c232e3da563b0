//! One connection, its two halves for two threads, and how its waits end.

use std::io::{self, IoSlice};
use std::net::ToSocketAddrs;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use socket2::{Domain, SockAddr, Socket, TcpKeepalive, Type};
use thiserror::Error;

use super::interrupt::{Wait, wait_to_finish};
use super::{Address, Interrupt, TransportError, Wake};

/// After this long without an acknowledgement, or with a peer that takes nothing, TCP gives the connection up.
const DEAD_AFTER: Duration = Duration::from_secs(30);
/// When an idle connection begins to be probed, and how often.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5)).with_retries(4);
/// What a read takes beyond what was asked for, so that the next header comes with the same system call. Small, because it is copied.
const READ_AHEAD: usize = 8 << 10;
/// A read of many pages waits for so much at once. TCP would wake the reader for every 64 KiB or less, which the sender pays for: 10 µs and
/// more each time that the reader's processor idles, a fifth of its time in all.
const LOW_WATER: usize = 512 << 10;
/// A read of less than this is not worth a system call more.
const SMALL_READ: usize = 64 << 10;
/// A congestion control without pacing: Linux's default.
const UNPACED: &[u8] = b"cubic";
/// How long a message of which a part was sent may still take when an interrupt is raised, so that something can follow it.
const GRACE: Duration = Duration::from_secs(1);
/// Most pieces that one sendmsg takes (UIO_MAXIOV).
const MAX_PIECES: usize = 1024;

/// Why a transfer ended early. The connection is of no further use, as part of a message may have passed, but for a write that was
/// [`LinkError::Interrupted`].
#[derive(Debug, Error)]
pub enum LinkError {
    /// The other side closed it. Whether that was a good moment is for the reader to judge: it was between messages only if nothing of
    /// this one had come.
    #[error("the other side closed the connection ({received} of {expected} bytes received)")]
    Closed {
        /// Bytes of this read that had come.
        received: usize,
        /// Bytes asked for.
        expected: usize,
    },
    /// The deadline passed.
    #[error("the other side did not answer in time")]
    TimedOut,
    /// [`Interrupt::raise`] was called. Of what was to be written nothing was sent.
    #[error("interrupted")]
    Interrupted,
    /// [`Interrupt::raise`] was called in the middle of a message, and the other side did not take the rest of it soon after.
    #[error("interrupted in the middle of a message")]
    CutShort,
    /// The connection is broken.
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
}

#[derive(Debug)]
struct Link {
    socket: Socket,
    peer: String,
    is_tcp: bool,
    /// The host's choice of a congestion control, if both ends are on it.
    congestion_control: Option<Vec<u8>>,
}

/// An established connection.
#[derive(Debug)]
pub struct Connection {
    link: Arc<Link>,
    interrupt: Interrupt,
}

/// Connects to `address`. `interrupt` will also end the waits of the connection itself. Resolving a host name cannot be interrupted.
pub fn connect(address: &Address, interrupt: &Interrupt, deadline: Option<Instant>) -> Result<Connection, TransportError> {
    let error = |source| TransportError::Connect { address: address.clone(), source };
    let candidates: Vec<(Domain, SockAddr)> = match address {
        Address::Tcp { host, port } => (host.as_str(), *port)
            .to_socket_addrs()
            .map_err(|source| TransportError::Resolve { address: address.clone(), source })?
            .map(|candidate| (Domain::for_address(candidate), candidate.into()))
            .collect(),
        Address::Unix(path) => vec![(Domain::UNIX, SockAddr::unix(path).map_err(error)?)],
    };
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for (domain, candidate) in candidates {
        let socket = Socket::new(domain, Type::STREAM, None).map_err(error)?;
        socket.set_nonblocking(true).map_err(error)?;
        let started = match socket.connect(&candidate) {
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {
                match interrupt.wait_for(&socket, PollFlags::OUT, deadline).map_err(error)? {
                    Wait::Ready => socket.take_error().and_then(|failed| failed.map_or(Ok(()), Err)),
                    Wait::TimedOut => return Err(TransportError::TimedOut(address.clone())),
                    Wait::Interrupted => return Err(TransportError::Interrupted),
                }
            }
            other => other,
        };
        match started {
            Ok(()) => return Connection::new(socket, address.to_string(), interrupt.clone()).map_err(error),
            Err(e) => last = e,
        }
    }
    Err(error(last))
}

impl Connection {
    pub(super) fn new(socket: Socket, peer: String, interrupt: Interrupt) -> io::Result<Self> {
        // Waits are `poll`s, together with the interrupt.
        socket.set_nonblocking(true)?;
        let local = socket.local_addr()?.as_socket();
        let is_tcp = local.is_some();
        let mut congestion_control = None;
        if let Some(local) = local {
            socket.set_tcp_nodelay(true)?;
            socket.set_tcp_keepalive(&KEEPALIVE)?;
            socket.set_tcp_user_timeout(Some(DEAD_AFTER))?;
            // A peer that has gone is for the first read to tell.
            if socket.peer_addr().is_ok_and(|peer| peer.as_socket().is_some_and(|peer| peer.ip() == local.ip())) {
                congestion_control = socket.tcp_congestion().ok();
            }
        }
        Ok(Connection { link: Arc::new(Link { socket, peer, is_tcp, congestion_control }), interrupt })
    }

    /// The other side, for messages to people.
    pub fn peer(&self) -> &str {
        &self.link.peer
    }

    /// Keeps at most about `bytes` waiting unsent in the kernel, so that what is urgent need not queue behind it: TCP_NOTSENT_LOWAT, or
    /// the send buffer of a Unix socket.
    pub fn limit_unsent(&self, bytes: u32) -> io::Result<()> {
        let socket = &self.link.socket;
        if self.link.is_tcp { socket.set_tcp_notsent_lowat(bytes) } else { socket.set_send_buffer_size(bytes as usize) }
    }

    /// Sets the kernel's buffers, in bytes each. TCP grows them by itself where this is not called.
    pub fn set_buffer_sizes(&self, send: usize, receive: usize) -> io::Result<()> {
        self.link.socket.set_send_buffer_size(send)?;
        self.link.socket.set_recv_buffer_size(receive)
    }

    /// From here on `interrupt` alone ends the waits of the connection.
    pub fn interrupted_by(self, interrupt: &Interrupt) -> Self {
        Connection { interrupt: interrupt.clone(), ..self }
    }

    /// What closes the connection from elsewhere.
    pub fn closer(&self) -> Closer {
        Closer { link: self.link.clone() }
    }

    /// The halves, each for one thread. The connection is closed when both and all closers are gone.
    pub fn split(self) -> (Reader, Writer) {
        let reader = Reader {
            link: self.link.clone(),
            interrupt: self.interrupt.clone(),
            ahead: vec![0; READ_AHEAD].into_boxed_slice(),
            start: 0,
            end: 0,
            low_water: 1,
        };
        (reader, Writer { link: self.link, interrupt: self.interrupt })
    }
}

/// Closes a connection that other threads use.
#[derive(Clone, Debug)]
pub struct Closer {
    link: Arc<Link>,
}

impl Closer {
    /// Ends both directions: readers and writers on both sides find the connection closed.
    pub fn shutdown(&self) {
        // Fails only if it is closed already.
        let _ = self.link.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// The sending half.
#[derive(Debug)]
pub struct Writer {
    link: Arc<Link>,
    interrupt: Interrupt,
}

impl Writer {
    /// Sends all of `pieces`, in order. If it is interrupted when a part was sent, it sends the rest all the same if that takes no longer
    /// than a second: otherwise nobody could be told why it ends.
    pub fn write_all_vectored(&mut self, pieces: &[IoSlice<'_>], deadline: Option<Instant>) -> Result<(), LinkError> {
        let mut raw: Vec<_> =
            pieces.iter().map(|piece| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() }).collect();
        // SAFETY: every piece is borrowed until this returns.
        unsafe { self.write_all_raw(&mut raw, deadline) }
    }

    /// Sends all of `bytes`.
    pub fn write_all(&mut self, bytes: &[u8], deadline: Option<Instant>) -> Result<(), LinkError> {
        self.write_all_vectored(&[IoSlice::new(bytes)], deadline)
    }

    /// Like [`write_all_vectored`](Self::write_all_vectored) for memory that others may be writing. Uses `pieces` up.
    ///
    /// # Safety
    /// Every piece must be mapped memory until this returns. Bytes written meanwhile are sent as they were before or after.
    pub unsafe fn write_all_raw(&mut self, mut pieces: &mut [libc::iovec], deadline: Option<Instant>) -> Result<(), LinkError> {
        let mut begun = false;
        let mut finish_by = None;
        loop {
            let done = pieces.iter().take_while(|piece| piece.iov_len == 0).count();
            pieces = std::mem::take(&mut pieces).split_at_mut(done).1;
            if pieces.is_empty() {
                return Ok(());
            }
            if finish_by.is_none() && self.interrupt.is_raised() {
                if !begun {
                    return Err(LinkError::Interrupted);
                }
                let latest = Instant::now() + GRACE;
                finish_by = Some(deadline.map_or(latest, |deadline| deadline.min(latest)));
            }
            // SAFETY: all-zero is a valid msghdr.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = pieces.as_mut_ptr();
            message.msg_iovlen = pieces.len().min(MAX_PIECES);
            // SAFETY: `message` points to `pieces`, which are mapped by this function's contract; the kernel only reads them.
            let sent = unsafe { libc::sendmsg(self.link.socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
            match usize::try_from(sent) {
                Ok(sent) => {
                    begun |= sent > 0;
                    advance(pieces, sent);
                }
                Err(_) => self.wait_for_room(io::Error::last_os_error(), deadline, finish_by)?,
            }
        }
    }

    /// After a failed write: waits where that helps, to `finish_by` if the write goes on in spite of an interrupt.
    fn wait_for_room(&self, error: io::Error, deadline: Option<Instant>, finish_by: Option<Instant>) -> Result<(), LinkError> {
        let waited = retry(error, || match finish_by {
            Some(latest) => wait_to_finish(&self.link.socket, latest),
            None => self.interrupt.wait_for(&self.link.socket, PollFlags::OUT, deadline),
        });
        match (waited, finish_by) {
            (Err(LinkError::TimedOut), Some(_)) => Err(LinkError::CutShort),
            // The next turn of the write judges it by what was sent.
            (Err(LinkError::Interrupted), _) => Ok(()),
            (waited, _) => waited,
        }
    }

    /// Within one host: whether TCP may pace what is sent, where the host's choice of a congestion control (bbr) does so. No link's rate is to
    /// be met there, and the timers take a fifth of the sender's time; the pauses are good for whoever shares the processors, though.
    pub fn set_paced(&mut self, paced: bool) {
        if let Some(chosen) = &self.link.congestion_control {
            // A host that has no other goes on with its own.
            let _ = self.link.socket.set_tcp_congestion(if paced { chosen } else { UNPACED });
        }
    }

    /// From here on `interrupt` alone ends this half's waits.
    pub fn interrupted_by(self, interrupt: &Interrupt) -> Self {
        Writer { interrupt: interrupt.clone(), ..self }
    }

    /// Tells the other side that nothing more will come; it can still send.
    pub fn finish(&mut self) -> Result<(), LinkError> {
        Ok(self.link.socket.shutdown(std::net::Shutdown::Write)?)
    }
}

/// The receiving half. Reads a little ahead.
#[derive(Debug)]
pub struct Reader {
    link: Arc<Link>,
    interrupt: Interrupt,
    ahead: Box<[u8]>,
    /// What of `ahead` has come and was not asked for yet: `start..end`.
    start: usize,
    end: usize,
    /// From how many bytes on the socket counts as readable.
    low_water: usize,
}

/// What ended [`Reader::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// Something has come, or the connection has ended: the next read tells.
    Readable,
    /// [`Wake::wake`] was called; the wake is used up.
    Woken,
    /// The deadline passed.
    TimedOut,
}

impl Reader {
    /// From here on `interrupt` alone ends this half's waits.
    pub fn interrupted_by(self, interrupt: &Interrupt) -> Self {
        Reader { interrupt: interrupt.clone(), ..self }
    }

    /// Waits for the first byte of what comes next, for `wake`, or for the deadline.
    pub fn wait(&mut self, wake: &Wake, deadline: Option<Instant>) -> Result<Awaited, LinkError> {
        if self.start < self.end {
            return Ok(Awaited::Readable);
        }
        self.set_low_water(1);
        match self.interrupt.wait_for_either(&self.link.socket, wake, deadline)? {
            Wait::Interrupted => Err(LinkError::Interrupted),
            Wait::TimedOut => Ok(Awaited::TimedOut),
            Wait::Ready if wake.take() => Ok(Awaited::Woken),
            Wait::Ready => Ok(Awaited::Readable),
        }
    }

    /// Waits for the first byte of what comes next. Before a read that rarely finds something at once this saves the look in vain, for which
    /// others may have to wait.
    pub fn await_next(&mut self) -> Result<(), LinkError> {
        if self.start < self.end {
            return Ok(());
        }
        self.set_low_water(1);
        match self.interrupt.wait_for(&self.link.socket, PollFlags::IN, None)? {
            Wait::Interrupted => Err(LinkError::Interrupted),
            Wait::TimedOut | Wait::Ready => Ok(()),
        }
    }

    /// Whether a read would find something now, if only the end of the connection.
    pub fn has_more(&mut self) -> Result<bool, LinkError> {
        if self.start < self.end {
            return Ok(true);
        }
        self.set_low_water(1);
        let waited = self.interrupt.wait_for(&self.link.socket, PollFlags::IN, Some(Instant::now()))?;
        Ok(!matches!(waited, Wait::TimedOut))
    }

    /// Fills `bytes`.
    pub fn read_exact(&mut self, bytes: &mut [u8], deadline: Option<Instant>) -> Result<(), LinkError> {
        // SAFETY: `bytes` is borrowed until this returns.
        unsafe { self.read_exact_raw(bytes.as_mut_ptr(), bytes.len(), deadline) }
    }

    /// Fills the `length` bytes from `target` on, which others may be reading or writing. On an error any part of them may have been
    /// overwritten.
    ///
    /// # Safety
    /// They must be mapped, writable memory until this returns, and nothing may hold a reference to them.
    pub unsafe fn read_exact_raw(&mut self, target: *mut u8, length: usize, deadline: Option<Instant>) -> Result<(), LinkError> {
        let known = self.ahead.get(self.start..self.end).unwrap_or_default();
        let mut received = known.len().min(length);
        // SAFETY: `known` holds that many bytes, and `target` has room for them by this function's contract.
        unsafe { target.copy_from_nonoverlapping(known.as_ptr(), received) };
        self.start += received;
        while received < length {
            if self.interrupt.is_raised() {
                return Err(LinkError::Interrupted);
            }
            let missing = length - received;
            // SAFETY: `received` is less than `length`.
            let rest = libc::iovec { iov_base: unsafe { target.add(received) }.cast(), iov_len: missing };
            let mut pieces = [rest, libc::iovec { iov_base: self.ahead.as_mut_ptr().cast(), iov_len: self.ahead.len() }];
            // SAFETY: all-zero is a valid msghdr.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = pieces.as_mut_ptr();
            message.msg_iovlen = pieces.len();
            // SAFETY: the first piece is writable by this function's contract, the second is our own buffer, which is empty: what it
            // held was taken above, or the loop would not run.
            let got = unsafe { libc::recvmsg(self.link.socket.as_raw_fd(), &mut message, 0) };
            match usize::try_from(got) {
                Ok(0) => return Err(LinkError::Closed { received, expected: length }),
                Ok(got) => {
                    received += got.min(missing);
                    (self.start, self.end) = (0, got.saturating_sub(missing));
                }
                Err(_) => retry(io::Error::last_os_error(), || {
                    self.set_low_water(if missing < SMALL_READ { 1 } else { missing.min(LOW_WATER) });
                    self.interrupt.wait_for(&self.link.socket, PollFlags::IN, deadline)
                })?,
            }
        }
        Ok(())
    }

    /// SO_RCVLOWAT (socket(7)), which changes only how soon a wait ends. The kernel ends it earlier where its buffer cannot take so much, and
    /// at the connection's end; Unix sockets take no notice of it.
    fn set_low_water(&mut self, bytes: usize) {
        if self.low_water == bytes {
            return;
        }
        let value = bytes as libc::c_int;
        // SAFETY: the kernel reads one int.
        unsafe {
            libc::setsockopt(
                self.link.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        self.low_water = bytes;
    }
}

/// After a failed transfer: waits where that helps.
fn retry(error: io::Error, wait: impl FnOnce() -> io::Result<Wait>) -> Result<(), LinkError> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => match wait()? {
            Wait::Ready => Ok(()),
            Wait::TimedOut => Err(LinkError::TimedOut),
            Wait::Interrupted => Err(LinkError::Interrupted),
        },
        _ => Err(LinkError::Io(error)),
    }
}

/// Takes the first `sent` bytes off `pieces`, leaving what is used up with no length.
fn advance(pieces: &mut [libc::iovec], mut sent: usize) {
    for piece in pieces {
        let used = piece.iov_len.min(sent);
        // Within the piece, or just past its end.
        piece.iov_base = piece.iov_base.wrapping_byte_add(used);
        piece.iov_len -= used;
        sent -= used;
        if sent == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests;
