//! What is encoded of a stopped guest in the model: the pages that it brings along.

use ferry::memory::PageNumber;

use crate::memory::Version;

/// A page's number and its contents.
const PAGE: usize = size_of::<u64>() + size_of::<Version>();

/// Encodes the pages.
pub fn encode(pages: impl Iterator<Item = (PageNumber, Version)>) -> Vec<u8> {
    pages.flat_map(|(page, version)| [&page.0.to_le_bytes()[..], &version.to_le_bytes()].concat()).collect()
}

/// Decodes them.
pub fn decode(machine: &[u8]) -> Vec<(PageNumber, Version)> {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
    machine.chunks_exact(PAGE).map(|page| (PageNumber(number(&page[..8])), number(&page[8..]) as Version)).collect()
}
