//! Requests and their replies ("Transmission"), one after the other. Nothing is held while bytes go to or come from the client, so that a slow
//! one delays nobody.

use std::io::{Read, Write};

use super::ConnectionError;
use super::negotiation::Session;
use super::protocol::{MAX_REQUEST, Request, RequestError, chunk, chunk_head, command, command_flag as flag, simple_reply};
use crate::block::export_source::ExtentKind;

/// What is read or written at once, in bytes; a client's buffer. Giving the disk up waits for such a call.
const PIECE: usize = 1 << 20;

/// Answers a client's requests until it says goodbye.
pub fn serve(stream: &mut (impl Read + Write), session: &Session) -> Result<(), ConnectionError> {
    let mut transmission = Transmission { stream, session, buffer: Vec::new() };
    loop {
        let mut header = [0; Request::SIZE];
        transmission.stream.read_exact(&mut header)?;
        let request = Request::decode(&header).ok_or(ConnectionError::Protocol("wrong magic of a request"))?;
        match request.command {
            command::READ => transmission.read(&request)?,
            command::WRITE => transmission.write(&request)?,
            command::DISC => return Ok(()),
            _ => {
                let done = transmission.execute(&request);
                transmission.acknowledge(&request, done)?;
            }
        }
    }
}

struct Transmission<'a, S> {
    stream: &'a mut S,
    session: &'a Session,
    /// At most [`PIECE`] and the head of a reply.
    buffer: Vec<u8>,
}

impl<S: Read + Write> Transmission<'_, S> {
    /// Whether the request's flags are among `allowed`. FUA is, for all of them ("Command flags").
    fn check_flags(request: &Request, allowed: u16) -> Result<(), RequestError> {
        if request.flags & !(allowed | flag::FUA) == 0 { Ok(()) } else { Err(RequestError::Inval) }
    }

    /// Whether the range is whole blocks of the export, and not empty. `beyond` is for one that reaches beyond the end.
    fn check_range(&self, request: &Request, beyond: RequestError) -> Result<(), RequestError> {
        let source = &self.session.export.source;
        let (block, length) = (u64::from(source.block_size()), u64::from(request.length));
        if length == 0 || !request.offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(RequestError::Inval);
        }
        if request.offset.checked_add(length).is_none_or(|end| end > source.size()) { Err(beyond) } else { Ok(()) }
    }

    fn check_writable(&self) -> Result<(), RequestError> {
        if self.session.export.writable.is_some() { Ok(()) } else { Err(RequestError::Perm) }
    }

    /// Requests that carry no data and are answered without any, and `NBD_CMD_BLOCK_STATUS`, which sends its answer but for the end.
    fn execute(&mut self, request: &Request) -> Result<(), Failure> {
        let export = &self.session.export;
        let (offset, length) = (request.offset, u64::from(request.length));
        match request.command {
            command::FLUSH => {
                Self::check_flags(request, 0)?;
                export.flush().map_err(RequestError::from)?;
            }
            command::TRIM => {
                self.check_writable()?;
                Self::check_flags(request, 0)?;
                self.check_range(request, RequestError::Inval)?;
                export.discard(offset, length).map_err(RequestError::from)?;
                self.flush_if_forced(request)?;
            }
            command::WRITE_ZEROES => {
                self.check_writable()?;
                Self::check_flags(request, flag::NO_HOLE)?;
                self.check_range(request, RequestError::NoSpc)?;
                export.write_zeroes(offset, length, request.flags & flag::NO_HOLE == 0).map_err(RequestError::from)?;
                self.flush_if_forced(request)?;
            }
            command::BLOCK_STATUS => self.block_status(request)?,
            _ => return Err(RequestError::Inval.into()),
        }
        Ok(())
    }

    fn flush_if_forced(&self, request: &Request) -> Result<(), RequestError> {
        if request.flags & flag::FUA == 0 { Ok(()) } else { self.session.export.flush().map_err(RequestError::from) }
    }

    /// The end of a reply.
    fn acknowledge(&mut self, request: &Request, done: Result<(), Failure>) -> Result<(), ConnectionError> {
        let error = match done {
            Ok(()) => None,
            Err(Failure::Request(error)) => Some(error),
            Err(Failure::Connection(error)) => return Err(error),
        };
        match error {
            Some(error) if self.session.structured => {
                // Error, and no message.
                let payload = [&(error as u32).to_be_bytes()[..], &[0; 2]].concat();
                self.send_chunk(request, chunk::DONE, chunk::ERROR, &payload)
            }
            None if self.session.structured => self.send_chunk(request, chunk::DONE, chunk::NONE, &[]),
            error => Ok(self.stream.write_all(&simple_reply(request.cookie, error))?),
        }
    }

    fn send_chunk(&mut self, request: &Request, flags: u16, kind: u16, payload: &[u8]) -> Result<(), ConnectionError> {
        let head = chunk_head(flags, kind, request.cookie, payload.len() as u32);
        Ok(self.stream.write_all(&[&head, payload].concat())?)
    }

    fn block_status(&mut self, request: &Request) -> Result<(), Failure> {
        Self::check_flags(request, flag::REQ_ONE)?;
        self.check_range(request, RequestError::Inval)?;
        if self.session.contexts.is_empty() {
            return Err(RequestError::Inval.into());
        }
        let limit = if request.flags & flag::REQ_ONE == 0 { usize::MAX } else { 1 };
        for (id, context) in (0u32..).zip(&self.session.contexts) {
            let extents = context.extents(&*self.session.export.source, request.offset, request.length, limit);
            let mut payload = id.to_be_bytes().to_vec();
            for (length, flags) in extents.map_err(RequestError::from)? {
                payload.extend(length.to_be_bytes());
                payload.extend(flags.to_be_bytes());
            }
            self.send_chunk(request, 0, chunk::BLOCK_STATUS, &payload)?;
        }
        Ok(())
    }

    fn write(&mut self, request: &Request) -> Result<(), ConnectionError> {
        if request.length > MAX_REQUEST {
            // It is not worth reading all of it only to refuse it.
            return Err(ConnectionError::Protocol("a write that is longer than the largest request"));
        }
        let mut done = self
            .check_writable()
            .and_then(|()| Self::check_flags(request, 0))
            .and_then(|()| self.check_range(request, RequestError::NoSpc));
        let mut at = 0;
        while at < request.length as usize {
            let piece = (request.length as usize - at).min(PIECE);
            self.buffer.clear();
            self.buffer.resize(piece, 0);
            self.stream.read_exact(&mut self.buffer)?;
            // After an error the rest is still on its way, and is passed over.
            if done.is_ok() {
                done = self.session.export.write(&mut self.buffer, request.offset + at as u64).map_err(RequestError::from);
            }
            at += piece;
        }
        let done = done.and_then(|()| self.flush_if_forced(request));
        self.acknowledge(request, done.map_err(Failure::from))
    }

    fn read(&mut self, request: &Request) -> Result<(), ConnectionError> {
        let done = self.check_read(request).map_err(Failure::from).and_then(|()| match self.session.structured {
            true if request.flags & flag::DF != 0 => self.read_data(request, request.offset, request.length as usize),
            true => self.read_extents(request),
            false => self.read_simply(request),
        });
        match done {
            // A simple reply has been sent as a whole.
            Ok(()) if !self.session.structured => Ok(()),
            done => self.acknowledge(request, done),
        }
    }

    fn check_read(&self, request: &Request) -> Result<(), RequestError> {
        Self::check_flags(request, if self.session.structured { flag::DF } else { 0 })?;
        self.check_range(request, RequestError::Inval)?;
        if request.length > MAX_REQUEST {
            return Err(RequestError::Inval);
        }
        if request.flags & flag::DF != 0 && request.length as usize > PIECE { Err(RequestError::Overflow) } else { Ok(()) }
    }

    /// Sends a range as holes and data.
    fn read_extents(&mut self, request: &Request) -> Result<(), Failure> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        while at < end {
            let extent = self.session.export.source.allocation(at, end - at).map_err(RequestError::from)?;
            let extent_end = at + extent.length.clamp(1, end - at);
            if extent.kind == ExtentKind::Data {
                while at < extent_end {
                    let piece = (extent_end - at).min(PIECE as u64);
                    self.read_data(request, at, piece as usize)?;
                    at += piece;
                }
            } else {
                let payload = [&at.to_be_bytes()[..], &((extent_end - at) as u32).to_be_bytes()].concat();
                self.send_chunk(request, 0, chunk::OFFSET_HOLE, &payload)?;
                at = extent_end;
            }
        }
        Ok(())
    }

    /// Sends at most [`PIECE`] bytes as one chunk.
    fn read_data(&mut self, request: &Request, offset: u64, length: usize) -> Result<(), Failure> {
        let offset_bytes = offset.to_be_bytes();
        let payload = (offset_bytes.len() + length) as u32;
        let head = [&chunk_head(0, chunk::OFFSET_DATA, request.cookie, payload)[..], &offset_bytes].concat();
        self.fill(&head, offset, length)?;
        Ok(self.stream.write_all(&self.buffer)?)
    }

    fn read_simply(&mut self, request: &Request) -> Result<(), Failure> {
        let length = request.length as usize;
        let mut head = simple_reply(request.cookie, None).to_vec();
        let mut at = 0;
        while at < length {
            let piece = (length - at).min(PIECE);
            match self.fill(&head, request.offset + at as u64, piece) {
                Err(_) if at > 0 => return Err(ConnectionError::HalfRead.into()),
                filled => filled?,
            }
            self.stream.write_all(&self.buffer)?;
            head.clear();
            at += piece;
        }
        Ok(())
    }

    /// Makes the buffer `head` and what is read.
    fn fill(&mut self, head: &[u8], offset: u64, length: usize) -> Result<(), RequestError> {
        self.buffer.clear();
        self.buffer.extend(head);
        self.buffer.resize(head.len() + length, 0);
        let target = self.buffer.get_mut(head.len()..).unwrap_or_default();
        self.session.export.source.read_at(target, offset).map_err(RequestError::from)
    }
}

/// Why a request was not answered as it should be.
enum Failure {
    /// The client is to be told.
    Request(RequestError),
    /// The client cannot be told anything any more.
    Connection(ConnectionError),
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        Failure::Request(error)
    }
}

impl From<ConnectionError> for Failure {
    fn from(error: ConnectionError) -> Self {
        Failure::Connection(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::Connection(error.into())
    }
}
