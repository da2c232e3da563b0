//! The bytes of the NBD protocol: its numbers, and its structures from and to bytes. All names and values are those of the protocol's
//! document (doc/proto.md of the NetworkBlockDevice/nbd repository); every number on the wire is big-endian.

/// First 8 bytes of the server.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// The next 8 bytes (newstyle negotiation), and the beginning of every option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Beginning of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Beginning of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Beginning of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Beginning of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest string (names, descriptions, queries) in bytes.
pub const MAX_STRING: usize = 4096;
/// Longest payload of a request in bytes; the most that a client may count on ("Block size constraints").
pub const MAX_REQUEST: u32 = 32 << 20;

/// Handshake flags of the server.
pub mod handshake_flag {
    /// The server speaks the fixed newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The server need not send 124 zeros after `NBD_OPT_EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake.
pub mod option {
    /// Chooses an export and ends the handshake; the old way, which cannot be refused but by hanging up.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the connection.
    pub const ABORT: u32 = 2;
    /// Lists the exports.
    pub const LIST: u32 = 3;
    /// Describes an export.
    pub const INFO: u32 = 6;
    /// Describes an export, chooses it and ends the handshake.
    pub const GO: u32 = 7;
    /// Switches structured replies on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Lists the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// There is no such option here.
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Facts about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// What it is, for people.
    pub const DESCRIPTION: u16 = 2;
    /// Least, preferred and largest size of requests.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// It cannot be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// There is `NBD_CMD_FLUSH`.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// There is `NBD_CMD_FLAG_FUA`.
    pub const SEND_FUA: u16 = 1 << 3;
    /// There is `NBD_CMD_TRIM`.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// There is `NBD_CMD_WRITE_ZEROES`.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// There is `NBD_CMD_FLAG_DF`.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see the same content, and a flush on one counts for all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Request types.
pub mod command {
    #![expect(missing_docs, reason = "the names say it")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod command_flag {
    /// Durable before it is answered.
    pub const FUA: u16 = 1 << 0;
    /// `NBD_CMD_WRITE_ZEROES` must not deallocate.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The answer to a read comes in one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Types of chunks of a structured reply.
pub mod chunk {
    /// Nothing more.
    pub const NONE: u16 = 0;
    /// Bytes read.
    pub const OFFSET_DATA: u16 = 1;
    /// A range that reads as zeros.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// The request failed.
    pub const ERROR: u16 = 1 << 15 | 1;
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1 << 0;
}

/// Flags of the extents of metadata contexts.
pub mod state {
    /// `base:allocation`: takes no space.
    pub const HOLE: u32 = 1 << 0;
    /// `base:allocation`: reads as zeros.
    pub const ZERO: u32 = 1 << 1;
    /// `qemu:dirty-bitmap:NAME` (QEMU's docs/interop/nbd.txt): was changed.
    pub const DIRTY: u32 = 1 << 0;
}

/// Why a request failed, as a number on the wire ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are errno's")]
#[repr(u32)]
pub enum RequestError {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

impl From<std::io::Error> for RequestError {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => RequestError::Perm,
            Some(libc::ENOMEM) => RequestError::NoMem,
            Some(libc::EINVAL) => RequestError::Inval,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => RequestError::NoSpc,
            Some(libc::EOPNOTSUPP) => RequestError::NotSup,
            Some(libc::ESHUTDOWN) => RequestError::Shutdown,
            None if error.kind() == std::io::ErrorKind::InvalidInput => RequestError::Inval,
            _ => RequestError::Io,
        }
    }
}

/// Takes big-endian numbers and strings off bytes; nothing where too few are left.
#[derive(Clone, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    /// 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string behind its length in 32 bits; nothing where it is too long or no UTF-8.
    pub fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok().filter(|length| *length <= MAX_STRING)?;
        let (string, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        std::str::from_utf8(string).ok()
    }
}

/// What precedes the data of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of [`option`], if it is known.
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    /// Size in bytes.
    pub const SIZE: usize = 16;

    /// Nothing where the magic is wrong.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u64()?;
        (magic == IHAVEOPT).then_some(OptionHeader { option: fields.u32()?, length: fields.u32()? })
    }
}

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Of [`command_flag`], if they are known.
    pub flags: u16,
    /// One of [`command`], if it is known.
    pub command: u16,
    /// The client's name for it, which the reply repeats.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u32,
}

impl Request {
    /// Size in bytes.
    pub const SIZE: usize = 28;

    /// Nothing where the magic is wrong.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = fields.u32()?;
        let (flags, command, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
        (magic == REQUEST_MAGIC).then_some(Request { flags, command, cookie, offset: fields.u64()?, length: fields.u32()? })
    }

    /// As a client sends it.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(self.length.to_be_bytes());
        bytes
    }
}

/// A reply to an option, without data of its own.
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// `text` behind its length.
pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

/// The head of a simple reply. Data follow it where a read succeeded.
pub fn simple_reply(cookie: u64, error: Option<RequestError>) -> [u8; 16] {
    let mut bytes = [0; 16];
    let parts = [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.map_or(0, |error| error as u32).to_be_bytes(), &cookie.to_be_bytes()];
    for (byte, value) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
        *byte = *value;
    }
    bytes
}

/// The head of a chunk with `length` bytes of payload.
pub fn chunk_head(flags: u16, kind: u16, cookie: u64, length: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    let parts = [
        &STRUCTURED_REPLY_MAGIC.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    for (byte, value) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
        *byte = *value;
    }
    bytes
}
