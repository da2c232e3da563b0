//! The handshake ("Newstyle negotiation"): options until the client chooses an export.
//!
//! A client that breaks off, or whose words cannot be told apart any more, is an error that ends its connection; everything else that is wrong
//! with an option is answered.

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::ConnectionError;
use super::catalogue::{Attached, Catalogue, Disconnect};
use super::export::Export;
use super::meta_context::{MetaContext, QueryPurpose};
use super::protocol::{
    Fields, IHAVEOPT, MAX_REQUEST, MAX_STRING, NBDMAGIC, OptionHeader, handshake_flag, info, option, option_reply as reply, string,
};

/// Longest data of an option that is looked at, in bytes; longer ones are read and refused.
const MAX_OPTION: u32 = 64 << 10;
/// What a client may prefer as the unit of its requests, in bytes.
const PREFERRED_BLOCK: u32 = 4096;

/// What a client has chosen.
pub struct Session {
    /// The export.
    pub export: Attached,
    /// Whether replies are structured.
    pub structured: bool,
    /// Metadata contexts; their ids on the wire are their places here.
    pub contexts: Vec<MetaContext>,
}

/// What a server lets its clients choose from.
pub struct Offer<'a> {
    /// The exports.
    pub catalogue: &'a Arc<Catalogue>,
    /// Whether a client may have more than one connection.
    pub multi_conn: bool,
}

/// Leads the handshake with a client; nothing if the client ends it. `disconnect` ends the client's connection when its export is removed.
pub fn negotiate(stream: &mut (impl Read + Write), offer: &Offer<'_>, disconnect: &Disconnect) -> Result<Option<Session>, ConnectionError> {
    let server_flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    stream.write_all(&[&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &server_flags.to_be_bytes()].concat())?;
    let mut client_flags = [0; 4];
    stream.read_exact(&mut client_flags)?;
    let client_flags = u32::from_be_bytes(client_flags);
    if client_flags & !u32::from(server_flags) != 0 {
        return Err(ConnectionError::Protocol("unknown client flags"));
    }
    let has = |flag: u16| client_flags & u32::from(flag) != 0;
    let mut negotiation = Negotiation { stream, offer, disconnect, structured: false, selected: None };
    loop {
        let mut header = [0; OptionHeader::SIZE];
        negotiation.stream.read_exact(&mut header)?;
        let header = OptionHeader::decode(&header).ok_or(ConnectionError::Protocol("wrong magic of an option"))?;
        if header.option == option::EXPORT_NAME {
            return negotiation.export_name(header.length, has(handshake_flag::NO_ZEROES)).map(Some);
        }
        if !has(handshake_flag::FIXED_NEWSTYLE) {
            return Err(ConnectionError::Protocol("an option other than the export's name without fixed newstyle"));
        }
        match negotiation.answer(header)? {
            Next::Option => {}
            Next::Transmission(session) => return Ok(Some(session)),
            Next::End => return Ok(None),
        }
    }
}

/// What follows an option.
enum Next {
    Option,
    Transmission(Session),
    End,
}

/// An option that is answered with an error.
struct Refusal(u32, &'static str);

const INVALID: Refusal = Refusal(reply::ERR_INVALID, "malformed option");
const UNKNOWN: Refusal = Refusal(reply::ERR_UNKNOWN, "no such export");

struct Negotiation<'a, S> {
    stream: &'a mut S,
    offer: &'a Offer<'a>,
    disconnect: &'a Disconnect,
    structured: bool,
    /// Contexts, and of which export.
    selected: Option<(Arc<Export>, Vec<MetaContext>)>,
}

impl<S: Read + Write> Negotiation<'_, S> {
    fn answer(&mut self, header: OptionHeader) -> Result<Next, ConnectionError> {
        let OptionHeader { option, length } = header;
        let data = self.data(length)?;
        let answered = match &data {
            None => Err(Refusal(reply::ERR_TOO_BIG, "the option is too long")),
            Some(data) => match option {
                option::ABORT => {
                    // The client may be gone already.
                    let _ = self.reply(option, reply::ACK, &[]);
                    return Ok(Next::End);
                }
                option::LIST => self.list(data)?,
                option::INFO | option::GO => match self.describe(option, data)? {
                    Ok(Some(session)) => return Ok(Next::Transmission(session)),
                    described => described.map(drop),
                },
                option::STRUCTURED_REPLY => self.structured_reply(data),
                option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data)?,
                _ => Err(Refusal(reply::ERR_UNSUP, "unsupported option")),
            },
        };
        match answered {
            Ok(()) => self.reply(option, reply::ACK, &[])?,
            Err(Refusal(kind, text)) => self.reply(option, kind, text.as_bytes())?,
        }
        Ok(Next::Option)
    }

    /// An option's data; nothing where they are too long, and then they are passed over.
    fn data(&mut self, length: u32) -> Result<Option<Vec<u8>>, ConnectionError> {
        let mut data = Vec::new();
        let mut bytes = Read::take(&mut *self.stream, length.into());
        let read = if length <= MAX_OPTION { bytes.read_to_end(&mut data)? as u64 } else { io::copy(&mut bytes, &mut io::sink())? };
        if read < u64::from(length) {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok((length <= MAX_OPTION).then_some(data))
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&super::protocol::option_reply(option, kind, data))
    }

    fn flags(&self, export: &Export) -> u16 {
        export.flags(self.structured, self.offer.multi_conn)
    }

    fn export_name(&mut self, length: u32, no_zeroes: bool) -> Result<Session, ConnectionError> {
        let name = self.data(length)?.filter(|name| name.len() <= MAX_STRING).and_then(|name| String::from_utf8(name).ok());
        let session = name.and_then(|name| self.session(&name)).ok_or(ConnectionError::Protocol("no such export"))?;
        let mut answer = session.export.source.size().to_be_bytes().to_vec();
        answer.extend(self.flags(&session.export).to_be_bytes());
        if !no_zeroes {
            answer.extend([0; 124]);
        }
        self.stream.write_all(&answer)?;
        Ok(session)
    }

    /// From here on the export is in use.
    fn session(&mut self, name: &str) -> Option<Session> {
        let export = self.offer.catalogue.attach(name, self.disconnect.clone())?;
        // Contexts chosen for another export do not count ("NBD_OPT_SET_META_CONTEXT").
        let contexts = self.selected.take().filter(|(of, _)| Arc::ptr_eq(of, &export)).map_or_else(Vec::new, |(_, contexts)| contexts);
        Some(Session { export, structured: self.structured, contexts })
    }

    fn list(&mut self, data: &[u8]) -> io::Result<Result<(), Refusal>> {
        if !data.is_empty() {
            return Ok(Err(INVALID));
        }
        for export in self.offer.catalogue.list() {
            let description = export.description.as_deref().unwrap_or_default();
            self.reply(option::LIST, reply::SERVER, &[&string(&export.name)[..], description.as_bytes()].concat())?;
        }
        Ok(Ok(()))
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() || self.structured {
            return Err(INVALID);
        }
        self.structured = true;
        Ok(())
    }

    /// `NBD_OPT_INFO`, and `NBD_OPT_GO` with the session that it begins.
    fn describe(&mut self, option: u32, data: &[u8]) -> Result<Result<Option<Session>, Refusal>, ConnectionError> {
        let Some((name, wanted)) = parse_info(data) else { return Ok(Err(INVALID)) };
        let (export, session) = if option == option::GO {
            let Some(session) = self.session(name) else { return Ok(Err(UNKNOWN)) };
            (Arc::clone(&session.export), Some(session))
        } else {
            let Some(export) = self.offer.catalogue.find(name) else { return Ok(Err(UNKNOWN)) };
            (export, None)
        };
        let fact = |kind: u16, content: &[u8]| [&kind.to_be_bytes(), content].concat();
        let block = export.source.block_size();
        let blocks = [block, block.max(PREFERRED_BLOCK), MAX_REQUEST].map(u32::to_be_bytes).concat();
        let size_and_flags = [&export.source.size().to_be_bytes()[..], &self.flags(&export).to_be_bytes()].concat();
        let mut facts = vec![fact(info::EXPORT, &size_and_flags), fact(info::BLOCK_SIZE, &blocks)];
        if wanted.contains(&info::NAME) {
            facts.push(fact(info::NAME, export.name.as_bytes()));
        }
        if let Some(description) = export.description.as_ref().filter(|_| wanted.contains(&info::DESCRIPTION)) {
            facts.push(fact(info::DESCRIPTION, description.as_bytes()));
        }
        for fact in facts {
            self.reply(option, reply::INFO, &fact)?;
        }
        if session.is_some() {
            self.reply(option, reply::ACK, &[])?;
        }
        Ok(Ok(session))
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> io::Result<Result<(), Refusal>> {
        let purpose = if option == option::SET_META_CONTEXT { QueryPurpose::Set } else { QueryPurpose::List };
        if purpose == QueryPurpose::Set {
            self.selected = None;
        }
        let Some((name, queries)) = parse_queries(data).filter(|_| self.structured) else { return Ok(Err(INVALID)) };
        let Some(export) = self.offer.catalogue.find(name) else { return Ok(Err(UNKNOWN)) };
        let mut contexts = MetaContext::all(&export);
        // Without a query, listing is for everything, and choosing for nothing.
        if purpose == QueryPurpose::Set || !queries.is_empty() {
            contexts.retain(|context| queries.iter().any(|query| context.matches(query, purpose)));
        }
        for (id, context) in (0u32..).zip(&contexts) {
            self.reply(option, reply::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()].concat())?;
        }
        if purpose == QueryPurpose::Set {
            self.selected = Some((export, contexts));
        }
        Ok(Ok(()))
    }
}

/// The export's name and the facts that are wanted.
fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    // As many as there are bytes for, whatever the count.
    let wanted: Vec<u16> = std::iter::from_fn(|| fields.u16()).collect();
    (wanted.len() == usize::from(count) && fields.0.is_empty()).then_some((name, wanted))
}

/// The export's name and the queries.
fn parse_queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    while !fields.0.is_empty() {
        queries.push(fields.string()?);
    }
    (u32::try_from(queries.len()) == Ok(count)).then_some((name, queries))
}
