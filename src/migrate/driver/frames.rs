//! Frames on connections.

use std::time::{Duration, Instant};

use thiserror::Error;

use crate::migrate::transport::{LinkError, Reader, Writer};
use crate::migrate::wire::{Frame, HEADER_SIZE, Header, WireError};

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
}

/// Reads one frame. Of a `Pages` frame only the header is read: the contents are the next bytes on the connection. Waits for the frame to
/// begin until `deadline`, and then [`FRAME_TIMEOUT`] for its body.
pub fn read(reader: &mut Reader, deadline: Option<Instant>) -> Result<Frame, FrameError> {
    let mut header = [0; HEADER_SIZE];
    reader.read_exact(&mut header, deadline)?;
    let header = Header::decode(header)?;
    let mut body = Vec::new();
    if !matches!(header.kind, crate::migrate::wire::Kind::Pages) {
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
    let bytes = frame.encode()?;
    writer.write_all(&bytes, deadline)?;
    Ok(bytes.len() as u64)
}
