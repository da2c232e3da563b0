//! Frames on connections.

use std::io::IoSlice;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::migrate::transport::{LinkError, Reader, Writer};
use crate::migrate::wire::{Frame, HEADER_SIZE, Header, Kind, WireError};

/// How long the rest of a frame may take once its header has come. Far more than any link needs, so that a peer which stops in the middle
/// is not waited for for ever.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(60);
/// Memory for a body grows by this much at a time, as it comes: a header alone makes nobody allocate what it announces.
const BODY_STEP: usize = 1 << 20;

/// Why a frame could not be sent or received.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The connection failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The frame makes no sense.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The frame is none that the peer may send here and now; its body was not read.
    #[error("{kind:?} frame of {length} bytes out of place")]
    OutOfPlace {
        /// Its kind.
        kind: Kind,
        /// Length of its body.
        length: usize,
    },
}

/// What the destination of `pages` may say on the main connection.
pub fn from_destination(pages: u64) -> impl Fn(Header) -> bool {
    let longest_list = longest_list_of_pages(pages);
    move |header| match header.kind {
        Kind::Holding => header.length as u64 <= longest_list,
        Kind::Welcome | Kind::Abort | Kind::Prepared | Kind::PassAck | Kind::Ready | Kind::Running | Kind::Done => true,
        _ => false,
    }
}

/// A run takes at most six bytes and covers at least one page and a gap.
fn longest_list_of_pages(pages: u64) -> u64 {
    64 + pages.saturating_mul(4)
}

/// What the source may say on the main connection before its guest's size is known and its RAM is there.
pub fn from_new_source(header: Header) -> bool {
    matches!(header.kind, Kind::Setup | Kind::Abort)
}

/// What the source of `pages` may say on the main connection. Of the lists in a package only that of the missing pages grows with them.
pub fn from_source(pages: u64) -> impl Fn(Header) -> bool {
    let longest_package = (16 << 20) + longest_list_of_pages(pages);
    move |header| match header.kind {
        Kind::Switchover => header.length as u64 <= longest_package,
        Kind::Abort | Kind::PassEnd | Kind::Commit | Kind::Bitmap | Kind::BitmapComplete | Kind::End | Kind::Goodbye => true,
        _ => false,
    }
}

/// Reads one frame for which `allowed` holds: of any other the body is not even read. Of a `Pages` frame only the header is read: the
/// contents are the next bytes on the connection. Waits for the frame to begin until `deadline`, and then [`FRAME_TIMEOUT`] for its body.
pub fn read(reader: &mut Reader, allowed: impl Fn(Header) -> bool, deadline: Option<Instant>) -> Result<Frame, FrameError> {
    let mut header = [0; HEADER_SIZE];
    reader.read_exact(&mut header, deadline)?;
    let header = Header::decode(header)?;
    if !allowed(header) {
        return Err(FrameError::OutOfPlace { kind: header.kind, length: header.length });
    }
    let mut body = Vec::new();
    if header.kind != Kind::Pages {
        let deadline = Instant::now() + FRAME_TIMEOUT;
        while body.len() < header.length {
            let start = body.len();
            body.resize(header.length.min(start + BODY_STEP), 0);
            reader.read_exact(body.get_mut(start..).unwrap_or_default(), Some(deadline))?;
        }
    }
    Ok(Frame::decode(header, &body)?)
}

/// Sends one frame (of a `Pages` frame its header) and returns its length in bytes.
pub fn send(writer: &mut Writer, frame: &Frame, deadline: Option<Instant>) -> Result<u64, FrameError> {
    let (bytes, rest) = frame.encode_in_parts()?;
    writer.write_all_vectored(&[IoSlice::new(&bytes), IoSlice::new(rest)], deadline)?;
    Ok((bytes.len() + rest.len()) as u64)
}
