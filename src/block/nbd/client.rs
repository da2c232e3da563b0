//! A client of NBD exports that reads, and asks for what is allocated and what is dirty. The server can be any: nothing it says is trusted.

use std::io::{self, Read, Write};
use std::ops::Range;

use thiserror::Error;

use super::protocol::{
    Fields, IHAVEOPT, NBDMAGIC, OPTION_REPLY_MAGIC, Request, STRUCTURED_REPLY_MAGIC, chunk, command, handshake_flag, info, option,
    option_reply as reply, state, string,
};

/// Longest range of a read in bytes.
pub const MAX_READ: usize = 1 << 20;
/// Longest range whose status is asked for at once, in bytes.
const MAX_STATUS: u64 = 1 << 30;
/// Longest data of a reply to an option, in bytes.
const MAX_OPTION_REPLY: u32 = 64 << 10;
/// Most replies to one option.
const MAX_OPTION_REPLIES: usize = 64;
/// Longest payload of a chunk that is no data, in bytes: 128 Ki extents.
const MAX_CHUNK: u32 = 1 << 20;
const ALLOCATION: &str = "base:allocation";

/// Why an export cannot be read.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The connection broke.
    #[error("the connection to the NBD server broke: {0}")]
    Io(#[from] io::Error),
    /// What the server says cannot be understood.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(&'static str),
    /// An option was refused.
    #[error("the NBD server refuses {what} (error {error:#x}): {message}")]
    Option {
        /// Which.
        what: &'static str,
        /// One of [`option_reply`](mod@super::protocol::option_reply).
        error: u32,
        /// The server's words.
        message: String,
    },
    /// The export has no such metadata context.
    #[error("the NBD server does not tell {0}")]
    NoContext(String),
    /// A request was refused.
    #[error("the NBD server refuses a request: {}", io::Error::from_raw_os_error(*.0 as i32))]
    Request(u32),
}

/// What is known of a range of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Not dirty in the bitmap that was asked for.
    Clean,
    /// Reads as zeros.
    Zero,
    /// To be read.
    Data,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    size: u64,
    allocation: u32,
    /// Id of the bitmap's context, if one was asked for.
    dirty: Option<u32>,
    cookie: u64,
    /// Whether there is more to come of the reply to the last request.
    more: bool,
}

impl<S: Read + Write> Client<S> {
    /// Leads the handshake: chooses `export` with structured replies and its `base:allocation`, and with what is dirty in `bitmap`.
    pub fn negotiate(mut stream: S, export: &str, bitmap: Option<&str>) -> Result<Self, ClientError> {
        let greeting = take::<18>(&mut stream)?;
        let mut fields = Fields(&greeting);
        if fields.u64() != Some(NBDMAGIC) || fields.u64() != Some(IHAVEOPT) {
            return Err(ClientError::Protocol("it does not greet as a newstyle server"));
        }
        if fields.u16().unwrap_or_default() & handshake_flag::FIXED_NEWSTYLE == 0 {
            return Err(ClientError::Protocol("it does not speak fixed newstyle"));
        }
        let flags = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        stream.write_all(&flags.to_be_bytes())?;
        ask(&mut stream, option::STRUCTURED_REPLY, "structured replies", &[], |_, _| Ok(()))?;

        let bitmap = bitmap.map(|name| format!("qemu:dirty-bitmap:{name}"));
        let queries: Vec<&str> = std::iter::once(ALLOCATION).chain(bitmap.as_deref()).collect();
        let mut contexts = [string(export), (queries.len() as u32).to_be_bytes().to_vec()].concat();
        queries.iter().for_each(|query| contexts.extend(string(query)));
        let (mut allocation, mut dirty) = (None, None);
        ask(&mut stream, option::SET_META_CONTEXT, "metadata contexts", &contexts, |kind, data| {
            let mut fields = Fields(data);
            if kind == reply::META_CONTEXT {
                let id = fields.u32().ok_or(ClientError::Protocol("a metadata context without id"))?;
                match std::str::from_utf8(fields.0) {
                    Ok(ALLOCATION) => allocation = Some(id),
                    Ok(name) if bitmap.as_deref() == Some(name) => dirty = Some(id),
                    _ => {}
                }
            }
            Ok(())
        })?;
        let allocation = allocation.ok_or_else(|| ClientError::NoContext(ALLOCATION.into()))?;
        if let (Some(name), None) = (bitmap, dirty) {
            return Err(ClientError::NoContext(name));
        }

        let mut size = None;
        ask(&mut stream, option::GO, "the export", &[string(export), vec![0; 2]].concat(), |kind, data| {
            let mut fields = Fields(data);
            if kind == reply::INFO && fields.u16() == Some(info::EXPORT) {
                size = fields.u64();
            }
            Ok(())
        })?;
        let size = size.filter(|size| i64::try_from(*size).is_ok()).ok_or(ClientError::Protocol("an export without a size"))?;
        Ok(Client { stream, size, allocation, dirty, cookie: 0, more: false })
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What is known of the export from `offset`, which lies before its end: ranges one behind the other, at least one of them, none of them
    /// empty. They end where the server's answer ends.
    pub fn status(&mut self, offset: u64) -> Result<Vec<(Range<u64>, RangeKind)>, ClientError> {
        let length = self.size.saturating_sub(offset).min(MAX_STATUS) as u32;
        self.request(command::BLOCK_STATUS, offset, length)?;
        let (mut allocation, mut dirty) = (None, None);
        while let Some((kind, payload)) = self.chunk()? {
            if kind != chunk::BLOCK_STATUS {
                return Err(ClientError::Protocol("a wrong kind of answer to a status request"));
            }
            let mut fields = Fields(&payload);
            let id = fields.u32().ok_or(ClientError::Protocol("a status without a context"))?;
            let extents = extents(fields, offset, length)?;
            match id {
                id if id == self.allocation => allocation = Some(extents),
                id if Some(id) == self.dirty => dirty = Some(extents),
                _ => return Err(ClientError::Protocol("a status of a context that was not asked for")),
            }
        }
        let allocation = allocation.ok_or(ClientError::Protocol("a status without allocation"))?;
        // Without a bitmap all of it counts.
        let dirty = match self.dirty {
            Some(_) => dirty.ok_or(ClientError::Protocol("a status without the dirty bitmap"))?,
            None => vec![(offset..offset + u64::from(length), state::DIRTY)],
        };
        Ok(combine(&allocation, &dirty))
    }

    /// Reads all of `target`, at most [`MAX_READ`] bytes and not empty.
    pub fn read(&mut self, target: &mut [u8], offset: u64) -> Result<(), ClientError> {
        const OUTSIDE: ClientError = ClientError::Protocol("data from outside the range that was asked for");
        let length = u32::try_from(target.len()).map_err(|_| OUTSIDE)?;
        self.request(command::READ, offset, length)?;
        target.fill(0);
        let mut covered: Vec<Range<u64>> = Vec::new();
        while let Some((kind, payload)) = self.chunk()? {
            let mut fields = Fields(&payload);
            let at = fields.u64().and_then(|at| at.checked_sub(offset)).ok_or(OUTSIDE)?;
            let end = match kind {
                chunk::OFFSET_DATA => at.checked_add(fields.0.len() as u64),
                chunk::OFFSET_HOLE => fields.u32().and_then(|length| at.checked_add(length.into())),
                _ => return Err(ClientError::Protocol("a wrong kind of answer to a read")),
            };
            let range = at..end.ok_or(OUTSIDE)?;
            let place = target.get_mut(range.start as usize..range.end as usize).filter(|place| !place.is_empty()).ok_or(OUTSIDE)?;
            if kind == chunk::OFFSET_DATA {
                place.copy_from_slice(fields.0);
            }
            covered.push(range);
        }
        covered.sort_by_key(|range| range.start);
        let end = covered.iter().try_fold(0, |at, range| (range.start == at).then_some(range.end));
        if end == Some(u64::from(length)) { Ok(()) } else { Err(ClientError::Protocol("a read that was not answered as a whole")) }
    }

    fn request(&mut self, command: u16, offset: u64, length: u32) -> Result<(), ClientError> {
        self.cookie += 1;
        self.more = true;
        Ok(self.stream.write_all(&Request { flags: 0, command, cookie: self.cookie, offset, length }.encode())?)
    }

    /// The next chunk of the reply to the request before, its type and payload; nothing where the reply is over. The reply ends with an error
    /// where one of its chunks is one.
    fn chunk(&mut self) -> Result<Option<(u16, Vec<u8>)>, ClientError> {
        if !self.more {
            return Ok(None);
        }
        let head = take::<20>(&mut self.stream)?;
        let mut fields = Fields(&head);
        let magic = fields.u32();
        let (Some(flags), Some(kind), Some(cookie), Some(length)) = (fields.u16(), fields.u16(), fields.u64(), fields.u32()) else {
            return Err(ClientError::Protocol("half a chunk"));
        };
        if magic != Some(STRUCTURED_REPLY_MAGIC) || cookie != self.cookie {
            return Err(ClientError::Protocol("no reply to the request"));
        }
        let limit = if kind == chunk::OFFSET_DATA { MAX_READ as u32 + 8 } else { MAX_CHUNK };
        let payload = payload(&mut self.stream, length, limit)?;
        self.more = flags & chunk::DONE == 0;
        if kind & (1 << 15) != 0 {
            let error = Fields(&payload).u32().ok_or(ClientError::Protocol("an error without number"))?;
            return Err(ClientError::Request(error));
        }
        match kind {
            chunk::NONE if !self.more && payload.is_empty() => Ok(None),
            chunk::NONE => Err(ClientError::Protocol("an empty chunk in the middle of a reply")),
            kind => Ok(Some((kind, payload))),
        }
    }
}

/// Extents from their bytes, cut off where the request ends.
fn extents(mut fields: Fields<'_>, offset: u64, length: u32) -> Result<Vec<(Range<u64>, u32)>, ClientError> {
    let (mut at, end) = (offset, offset + u64::from(length));
    let mut extents = Vec::new();
    while let (Some(length), Some(flags)) = (fields.u32(), fields.u32()) {
        if length == 0 || at == end {
            return Err(ClientError::Protocol("an extent that is empty or out of place"));
        }
        let extent = at..at.saturating_add(length.into()).min(end);
        at = extent.end;
        extents.push((extent, flags));
    }
    if extents.is_empty() || !fields.0.is_empty() {
        return Err(ClientError::Protocol("malformed extents"));
    }
    Ok(extents)
}

/// Both lists begin at the same offset; what comes after the end of the shorter one is left out.
fn combine(allocation: &[(Range<u64>, u32)], dirty: &[(Range<u64>, u32)]) -> Vec<(Range<u64>, RangeKind)> {
    let (mut allocation, mut dirty) = (allocation.iter().peekable(), dirty.iter().peekable());
    let mut combined: Vec<(Range<u64>, RangeKind)> = Vec::new();
    while let (Some((allocated, of_allocation)), Some((changed, of_bitmap))) = (allocation.peek(), dirty.peek()) {
        let range = allocated.start.max(changed.start)..allocated.end.min(changed.end);
        let kind = match (of_bitmap & state::DIRTY != 0, of_allocation & state::ZERO != 0) {
            (false, _) => RangeKind::Clean,
            (true, true) => RangeKind::Zero,
            (true, false) => RangeKind::Data,
        };
        if allocated.end == range.end {
            allocation.next();
        }
        if changed.end == range.end {
            dirty.next();
        }
        match combined.last_mut() {
            Some((last, same)) if *same == kind => last.end = range.end,
            _ => combined.push((range, kind)),
        }
    }
    combined
}

/// Sends an option and hears its replies up to the acknowledgement.
fn ask<S: Read + Write>(
    stream: &mut S,
    option: u32,
    what: &'static str,
    data: &[u8],
    mut hear: impl FnMut(u32, &[u8]) -> Result<(), ClientError>,
) -> Result<(), ClientError> {
    let head = [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes()].concat();
    stream.write_all(&[&head, data].concat())?;
    for _ in 0..MAX_OPTION_REPLIES {
        let head = take::<20>(stream)?;
        let mut fields = Fields(&head);
        if fields.u64() != Some(OPTION_REPLY_MAGIC) || fields.u32() != Some(option) {
            return Err(ClientError::Protocol("no reply to the option"));
        }
        let (Some(kind), Some(length)) = (fields.u32(), fields.u32()) else { return Err(ClientError::Protocol("half a reply")) };
        let data = payload(stream, length, MAX_OPTION_REPLY)?;
        match kind {
            reply::ACK => return Ok(()),
            error if error & (1 << 31) != 0 => {
                return Err(ClientError::Option { what, error, message: String::from_utf8_lossy(&data).into_owned() });
            }
            kind => hear(kind, &data)?,
        }
    }
    Err(ClientError::Protocol("too many replies to an option"))
}

fn take<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).map(|()| bytes)
}

/// Takes as much memory as bytes come, whatever length was announced.
fn payload(stream: &mut impl Read, length: u32, limit: u32) -> Result<Vec<u8>, ClientError> {
    if length > limit {
        return Err(ClientError::Protocol("a reply that is too long"));
    }
    let mut bytes = Vec::new();
    stream.take(length.into()).read_to_end(&mut bytes)?;
    if bytes.len() < length as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(bytes)
}
