//! What a peer does to one side of a migration, read from bytes: frames as they are on the wire, and between them what else happens.

use std::time::Duration;

use ferry::migrate::wire::{Channel, Frame, HEADER_SIZE, Header, Kind};

use super::allocation::{proportionate, within};

/// One thing that happens.
#[derive(Debug)]
pub enum Step {
    /// A frame arrives.
    Frame(Channel, Frame),
    /// A connection breaks.
    Lost(Channel),
    /// Time passes.
    Wait(Duration),
    /// Something local, chosen by a byte.
    Local(u8),
    /// The driver does so many things.
    Poll(u8),
}

const URGENT: u8 = 0x80;
const LOST: u8 = 0x81;
const WAIT: u8 = 0x82;
const LOCAL: u8 = 0x83;
const POLL: u8 = 0x84;
const PAGES: u8 = 0x85;

/// Reads the steps of `data`, up to the first that is none: as a reader does, which ends the connection there.
pub fn steps(mut data: &[u8]) -> impl Iterator<Item = Step> {
    std::iter::from_fn(move || {
        let (&first, rest) = data.split_first()?;
        if first < URGENT {
            return frame(&mut data, Channel::Main);
        }
        let (&argument, after) = rest.split_first()?;
        if first == URGENT {
            data = rest;
            return frame(&mut data, Channel::Urgent);
        }
        if first == PAGES {
            data = rest;
            return frame(&mut data, Channel::Pages(0));
        }
        data = after;
        Some(match first {
            LOST => Step::Lost(match argument {
                0 => Channel::Main,
                1 => Channel::Urgent,
                _ => Channel::Pages(0),
            }),
            WAIT => Step::Wait(Duration::from_millis(u64::from(argument) * 100)),
            LOCAL => Step::Local(argument),
            POLL => Step::Poll(argument),
            _ => return None,
        })
    })
}

fn frame(data: &mut &[u8], channel: Channel) -> Option<Step> {
    let (header, rest) = data.split_first_chunk::<HEADER_SIZE>()?;
    let header = Header::decode(*header).ok()?;
    // The contents of pages are not looked at, so they are left out.
    let length = if header.kind == Kind::Pages { 0 } else { header.length };
    let (body, rest) = rest.split_at_checked(length)?;
    *data = rest;
    let frame = within(proportionate(length), || Frame::decode(header, body)).ok()?;
    Some(Step::Frame(channel, frame))
}
