//! Frames: what the two sides say to each other, and the bounds every one of them is held to before a byte of it is used.
//!
//! A frame is a header of 16 bytes, little endian, and a body:
//!
//! | bytes | meaning |
//! |---|---|
//! | 0 | kind ([`Kind`]) |
//! | 1..4 | zero |
//! | 4..8 | length of the body in bytes |
//! | 8..16 | first page of the run ([`Layout`](super::layout::Layout)) for `Pages`, `Compressed` and `Request`, else zero |
//!
//! The body of `Pages` is the contents of the pages; that of `Request` is a count (u64); that of `Compressed` is a count (u16), a method
//! (u8, [`Method`]), a zero and then the compressed contents; all others are postcard. `Hello` begins with a
//! magic and a range of protocol versions, which every version of Ferry must keep, so that strangers are told in words.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::report::{BlockWaits, Faults};
use crate::block::dirty_bitmap::BitmapRun;
use crate::memory::{PAGE_SIZE, PageNumber, PageRun};

mod body;
mod compressed;
mod header;
mod version;

pub use body::{BitmapFlags, BitmapInfo, BitmapPlace, Holding, Package, Setup, Totals};
use compressed::COMPRESSED_PREFIX;
pub use compressed::{Compressed, Method};
pub use header::Header;
pub use version::{MAX_ALIKE_BITMAP_WORDS, MAX_BITMAP_WORDS, OLDEST_VERSION, VERSION, run_limits};

/// Size of a frame's header in bytes.
pub const HEADER_SIZE: usize = 16;
/// First bytes of the first frame on every connection.
pub const MAGIC: [u8; 8] = *b"FERRYMIG";
/// Longest run in one `Pages` frame, in pages: 2 MiB, a huge page, so that a reader's buffer is small.
pub const MAX_RUN: u64 = 512;
/// Most connections for pages that a migration may have.
pub const MAX_PAGE_CHANNELS: u8 = 16;
/// Longest list of zero runs in one frame.
pub const MAX_ZERO_RUNS: usize = 1024;
/// Longest text that one side shows to the other's user, in bytes.
pub const MAX_TEXT: usize = 4096;

/// A frame cannot be understood, or must not be believed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// The first frame is not a `Hello` with our magic.
    #[error("the other end does not speak Ferry's migration protocol")]
    NotFerry,
    /// The peer speaks other versions of the protocol.
    #[error(
        "the other end speaks versions {oldest} to {newest} of Ferry's migration protocol, and this one speaks {OLDEST_VERSION} to \
         {VERSION}; use a version of Ferry that both have in common"
    )]
    Version {
        /// The oldest it speaks.
        oldest: u16,
        /// The newest it speaks.
        newest: u16,
    },
    /// No frame of this kind exists in this version.
    #[error("unknown frame kind {0:#04x}")]
    UnknownKind(u8),
    /// A byte that must be zero is not.
    #[error("frame header has bits set that must be zero")]
    Reserved,
    /// The body is longer than its kind allows, or shorter than it needs.
    #[error("{kind:?} frame with a body of {length} bytes")]
    Length {
        /// The frame's kind.
        kind: Kind,
        /// The length it announced.
        length: u64,
    },
    /// The body does not decode.
    #[error("{kind:?} frame with a malformed body")]
    Body {
        /// The frame's kind.
        kind: Kind,
    },
}

/// The kinds of frames; the number is the one on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "each is described at the variant of `Frame` with its name")]
pub enum Kind {
    Hello = 1,
    Welcome = 2,
    Abort = 3,
    Setup = 4,
    Prepared = 5,
    Pages = 6,
    Zero = 7,
    PassEnd = 8,
    PassAck = 9,
    Switchover = 10,
    Ready = 11,
    Commit = 12,
    Running = 13,
    Request = 14,
    Bitmap = 15,
    BitmapComplete = 16,
    End = 17,
    Done = 18,
    Holding = 19,
    Goodbye = 20,
    Compressed = 21,
}

impl Kind {
    const ALL: [Kind; 21] = {
        use Kind::*;
        [
            Hello,
            Welcome,
            Abort,
            Setup,
            Prepared,
            Pages,
            Zero,
            PassEnd,
            PassAck,
            Switchover,
            Ready,
            Commit,
            Running,
            Request,
            Bitmap,
            BitmapComplete,
            End,
            Done,
            Holding,
            Goodbye,
            Compressed,
        ]
    };

    /// Longest body of the kind, in bytes: what a peer can make us allocate.
    pub const fn max_length(self) -> usize {
        match self {
            Kind::Hello | Kind::Welcome => 512,
            Kind::Abort => MAX_TEXT + 16,
            Kind::Setup => 4 << 20,
            Kind::Pages => MAX_RUN as usize * PAGE_SIZE,
            // Sent only where it is shorter than the pages.
            Kind::Compressed => COMPRESSED_PREFIX + MAX_RUN as usize * PAGE_SIZE,
            Kind::Zero => MAX_ZERO_RUNS * 20 + 8,
            Kind::Switchover | Kind::Holding => 256 << 20,
            Kind::Bitmap => MAX_BITMAP_WORDS as usize * 10 + 64,
            Kind::Ready | Kind::Done => 1 << 20,
            Kind::Request => 8,
            Kind::Prepared
            | Kind::PassEnd
            | Kind::PassAck
            | Kind::Commit
            | Kind::Running
            | Kind::BitmapComplete
            | Kind::End
            | Kind::Goodbye => 64,
        }
    }
}

/// Which of a migration's connections this is. All are opened by the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Channel {
    /// Control, and dirty bitmaps.
    Main,
    /// Page requests and their answers, so that they never wait behind background pages.
    Urgent,
    /// Pages in the background, counted from 0, less than [`MAX_PAGE_CHANNELS`]. A page always travels on the same one ([`Channel::of`]), so
    /// that its versions come in order.
    Pages(u8),
}

impl Channel {
    /// The connection of `page`, where there are `count` of them.
    pub const fn of(page: PageNumber, count: u8) -> Channel {
        // Less than `count`, so it fits.
        Channel::Pages(if count == 0 { 0 } else { (page.0 / MAX_RUN % count as u64) as u8 })
    }
}

/// The first frame on each connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Which connection this is.
    pub channel: Channel,
    /// Random number that ties the connections of one migration together, also across a recovery.
    pub session: u128,
    /// Which of the migration's links this connection belongs to, counted from 0: a connection that was held up on its way cannot pass for
    /// one of a newer link.
    pub link: u32,
    /// Version of the program, for messages.
    pub program: String,
    /// The newest version of the protocol that both sides know; to be sent, the newest that this side knows.
    #[serde(skip)]
    pub version: u16,
}

/// What one side says to the other. S: sent by the source, D: by the destination.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// S: first frame of a connection.
    Hello(Hello),
    /// D: the answer to a `Hello` on the main connection.
    Welcome {
        /// The version of the protocol that both sides speak from here on: the newest that both know.
        version: u16,
        /// Version of the program, for messages.
        program: String,
    },
    /// S, D: the sender ends the migration before the commit; the text is for the person at the other side.
    Abort(String),
    /// S: what RAM is like, whether postcopy may come, how many connections for pages there will be, and the guest's configuration and
    /// host facts, encoded by the machine.
    Setup(Setup),
    /// D: host and disks were checked, RAM is there; pages may come. The machine is built meanwhile.
    Prepared,
    /// S, page and urgent connections: contents of a run of pages; they stand behind the header in place of a body.
    Pages(PageRun),
    /// S, page connections: contents of a run of pages, compressed.
    Compressed(Compressed),
    /// S, page connections: pages whose contents are zero.
    Zero(Vec<PageRun>),
    /// S: a precopy pass ends here. What was sent of it on the page connections together with those before amounts to the totals; it may
    /// still be on its way.
    PassEnd(Totals),
    /// D: everything before the `PassEnd` is in place, and the machine is built.
    PassAck,
    /// S: the guest stands still; here is its state.
    Switchover(Package),
    /// D: the state is loaded, only the commit is missing. With the time it took in microseconds, and warnings (bitmaps dropped).
    Ready {
        /// Time from the whole package in hand to everything loaded.
        load_us: u64,
        /// What went wrong without harming the guest.
        warnings: Vec<String>,
    },
    /// S: the source will never run the guest again; the destination must.
    Commit,
    /// D: the vCPUs run. With the time from the commit, in microseconds.
    Running(u64),
    /// D, urgent connection: a guest waits for these pages.
    Request(PageRun),
    /// S: words of a dirty bitmap from `first` on. As a number of words that are alike, and words: none where no bit is set, and one where
    /// all are. In version 1 at most [`MAX_BITMAP_WORDS`], and never alike with all bits set.
    Bitmap {
        /// Index in [`Package::bitmaps`].
        index: u32,
        /// First word.
        first: u64,
        /// The words.
        run: BitmapRun,
    },
    /// S: all words of the bitmap with this index have been sent.
    BitmapComplete(u32),
    /// S: every missing page and every bitmap has been sent.
    End,
    /// D: every page and every bitmap is in place; the source may forget the guest. With the page faults as measured here, and warnings.
    Done {
        /// Page faults served.
        faults: Box<Faults>,
        /// Warnings since `Ready`.
        warnings: Vec<String>,
        /// How long the guest's devices waited for blocks, if disks were copied.
        block_waits: Option<Box<BlockWaits>>,
    },
    /// D: the answer to a `Hello` on the main connection with the session of a migration whose link was lost after READY, behind the
    /// `Welcome`. The source goes on from here.
    Holding(Holding),
    /// S: the answer to `Done`: the source will not come back. Where `Switchover` would come: this was a dry run.
    Goodbye,
}

#[derive(Serialize, Deserialize)]
struct HelloBody(MagicAndVersions, Hello);

#[derive(Serialize, Deserialize)]
struct MagicAndVersions([u8; 8], [u8; 2], [u8; 2]);

impl Frame {
    /// The frame's kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Frame::Hello(_) => Kind::Hello,
            Frame::Welcome { .. } => Kind::Welcome,
            Frame::Abort(_) => Kind::Abort,
            Frame::Setup(_) => Kind::Setup,
            Frame::Prepared => Kind::Prepared,
            Frame::Pages(_) => Kind::Pages,
            Frame::Zero(_) => Kind::Zero,
            Frame::PassEnd(_) => Kind::PassEnd,
            Frame::PassAck => Kind::PassAck,
            Frame::Switchover(_) => Kind::Switchover,
            Frame::Ready { .. } => Kind::Ready,
            Frame::Commit => Kind::Commit,
            Frame::Running(_) => Kind::Running,
            Frame::Request(_) => Kind::Request,
            Frame::Bitmap { .. } => Kind::Bitmap,
            Frame::BitmapComplete(_) => Kind::BitmapComplete,
            Frame::End => Kind::End,
            Frame::Done { .. } => Kind::Done,
            Frame::Holding(_) => Kind::Holding,
            Frame::Goodbye => Kind::Goodbye,
            Frame::Compressed(_) => Kind::Compressed,
        }
    }

    /// The bytes on the wire; of a `Pages` frame only the header. An error means that the body is longer than its kind may be.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let (mut bytes, rest) = self.encode_in_parts()?;
        bytes.extend_from_slice(rest);
        Ok(bytes)
    }

    /// The same in two parts, the second of which is not copied: it is nearly all of a `Switchover`, for which the guest waits.
    pub fn encode_in_parts(&self) -> Result<(Vec<u8>, &[u8]), WireError> {
        let kind = self.kind();
        let mut bytes = vec![0; HEADER_SIZE];
        let mut page = 0;
        let mut rest: &[u8] = &[];
        match self {
            Frame::Pages(run) => return Ok((Header::pages(*run).encode().to_vec(), rest)),
            Frame::Request(run) => {
                page = run.first.0;
                bytes.extend(run.count.to_le_bytes());
            }
            Frame::Hello(hello) => {
                let versions = MagicAndVersions(MAGIC, OLDEST_VERSION.to_le_bytes(), VERSION.to_le_bytes());
                bytes = extend(bytes, kind, &HelloBody(versions, hello.clone()))?;
            }
            Frame::Welcome { version, program } => bytes = extend(bytes, kind, &(version, clipped(program, kind.max_length() - 16)))?,
            Frame::Abort(text) => bytes = extend(bytes, kind, &clipped(text, kind.max_length() - 16))?,
            Frame::Setup(setup) => {
                bytes = extend(bytes, kind, setup)?;
                if !setup.disks.is_empty() {
                    bytes = extend(bytes, kind, &setup.disks)?;
                }
            }
            Frame::Compressed(compressed) => {
                page = compressed.run.first.0;
                compressed.extend(&mut bytes);
            }
            Frame::Zero(runs) => bytes = extend(bytes, kind, runs)?,
            Frame::PassEnd(totals) => bytes = extend(bytes, kind, totals)?,
            Frame::Switchover(Package { sent, postcopy, missing, bitmaps, machine }) => {
                // As a whole package is: bytes are their number and then they.
                bytes = extend(bytes, kind, &(sent, postcopy, missing, bitmaps, machine.len()))?;
                rest = machine;
            }
            Frame::Ready { load_us, warnings } => bytes = extend(bytes, kind, &(load_us, warnings))?,
            Frame::Running(resume_us) => bytes = extend(bytes, kind, resume_us)?,
            Frame::Bitmap { index, first, run } => {
                let (alike, words) = match run {
                    BitmapRun::Zeroes(count) => (*count, &[][..]),
                    BitmapRun::Ones(count) => (*count, &[u64::MAX][..]),
                    BitmapRun::Words(words) => (0, words.as_slice()),
                };
                bytes = extend(bytes, kind, &(index, first, alike, words))?;
            }
            Frame::BitmapComplete(index) => bytes = extend(bytes, kind, index)?,
            Frame::Done { faults, warnings, block_waits } => {
                bytes = extend(bytes, kind, &(faults, warnings))?;
                if let Some(waits) = block_waits {
                    bytes = extend(bytes, kind, waits)?;
                }
            }
            Frame::Holding(holding) => bytes = extend(bytes, kind, holding)?,
            Frame::Prepared | Frame::PassAck | Frame::Commit | Frame::End | Frame::Goodbye => {}
        }
        let length = bytes.len() - HEADER_SIZE + rest.len();
        if length > kind.max_length() {
            return Err(WireError::Length { kind, length: length as u64 });
        }
        bytes[..HEADER_SIZE].copy_from_slice(&Header { kind, length, page }.encode());
        Ok((bytes, rest))
    }

    /// Reads the body that follows `header`; of a `Pages` frame the body is not looked at.
    pub fn decode(header: Header, body: &[u8]) -> Result<Self, WireError> {
        let kind = header.kind;
        Ok(match kind {
            Kind::Hello => {
                let (MagicAndVersions(magic, oldest, newest), rest) = postcard::take_from_bytes(body).map_err(|_| WireError::NotFerry)?;
                let (oldest, newest) = (u16::from_le_bytes(oldest), u16::from_le_bytes(newest));
                if magic != MAGIC {
                    return Err(WireError::NotFerry);
                }
                let version = newest.min(VERSION);
                if version < oldest.max(OLDEST_VERSION) {
                    return Err(WireError::Version { oldest, newest });
                }
                Frame::Hello(Hello { version, ..whole(rest, kind)? })
            }
            Kind::Welcome => {
                let (version, program) = whole(body, kind)?;
                Frame::Welcome { version, program: printable(program) }
            }
            Kind::Abort => Frame::Abort(printable(whole(body, kind)?)),
            Kind::Setup => {
                let (setup, disks) = whole_or_more(body, kind)?;
                // There is one way to say that no disk comes along.
                if disks.as_ref().is_some_and(Vec::is_empty) {
                    return Err(WireError::Body { kind });
                }
                Frame::Setup(Setup { disks: disks.unwrap_or_default(), ..setup })
            }
            Kind::Compressed => Frame::Compressed(Compressed::decode(header.page, body).ok_or(WireError::Body { kind })?),
            Kind::Prepared => whole(body, kind).map(|()| Frame::Prepared)?,
            Kind::Pages => Frame::Pages(header.run()),
            Kind::Zero => Frame::Zero(whole(body, kind)?),
            Kind::PassEnd => Frame::PassEnd(whole(body, kind)?),
            Kind::PassAck => whole(body, kind).map(|()| Frame::PassAck)?,
            Kind::Switchover => Frame::Switchover(whole(body, kind)?),
            Kind::Ready => {
                let (load_us, warnings): (_, Vec<_>) = whole(body, kind)?;
                Frame::Ready { load_us, warnings: warnings.into_iter().map(printable).collect() }
            }
            Kind::Commit => whole(body, kind).map(|()| Frame::Commit)?,
            Kind::Running => Frame::Running(whole(body, kind)?),
            Kind::Request => {
                let count = body.try_into().map(u64::from_le_bytes).map_err(|_| WireError::Body { kind })?;
                Frame::Request(PageRun { first: PageNumber(header.page), count })
            }
            Kind::Bitmap => {
                let (index, first, alike, words): (_, _, _, Vec<u64>) = whole(body, kind)?;
                let run = match (alike, words.as_slice()) {
                    (1.., []) => BitmapRun::Zeroes(alike),
                    (1.., [u64::MAX]) => BitmapRun::Ones(alike),
                    (0, [_, ..]) => BitmapRun::Words(words),
                    _ => return Err(WireError::Body { kind }),
                };
                Frame::Bitmap { index, first, run }
            }
            Kind::BitmapComplete => Frame::BitmapComplete(whole(body, kind)?),
            Kind::End => whole(body, kind).map(|()| Frame::End)?,
            Kind::Done => {
                let ((faults, warnings), block_waits): ((_, Vec<_>), _) = whole_or_more(body, kind)?;
                Frame::Done { faults, warnings: warnings.into_iter().map(printable).collect(), block_waits }
            }
            Kind::Holding => Frame::Holding(whole(body, kind)?),
            Kind::Goodbye => whole(body, kind).map(|()| Frame::Goodbye)?,
        })
    }
}

fn extend<T: Serialize>(bytes: Vec<u8>, kind: Kind, value: &T) -> Result<Vec<u8>, WireError> {
    postcard::to_extend(value, bytes).map_err(|_| WireError::Body { kind })
}

/// Decodes `body` and refuses bytes left over.
fn whole<T: DeserializeOwned>(body: &[u8], kind: Kind) -> Result<T, WireError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(WireError::Body { kind }),
    }
}

/// Decodes `body`, and what a newer version has put behind it, if that is there.
fn whole_or_more<T: DeserializeOwned, M: DeserializeOwned>(body: &[u8], kind: Kind) -> Result<(T, Option<M>), WireError> {
    let (value, more) = postcard::take_from_bytes(body).map_err(|_| WireError::Body { kind })?;
    Ok((value, if more.is_empty() { None } else { Some(whole(more, kind)?) }))
}

/// `text` for a person's terminal, to which the other side must not give orders.
fn printable(text: String) -> String {
    if text.contains(char::is_control) { text.replace(char::is_control, "?") } else { text }
}

/// The longest beginning of `text` that takes at most `limit` bytes.
fn clipped(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests;
