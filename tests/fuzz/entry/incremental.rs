//! An incremental backup.

use ferry::backup::incremental::{Change, FormatError, Header, MAX_DATA, Reader, Writer};
use sha2::{Digest, Sha256};

use super::allocation::{proportionate, within};

pub fn run(data: &[u8]) {
    check(data);
    // As if it had been written so: otherwise nothing gets past the checksum.
    let sealed = [data, &Sha256::digest(data)[..]].concat();
    check(&sealed);
}

fn check(bytes: &[u8]) {
    let Ok((header, written)) = within(proportionate(bytes.len()), || again(bytes)) else { return };
    let (header_again, written_again) = again(&written).expect("what was written");
    assert!(header == header_again && written == written_again);
}

/// Reads it and writes it once more.
fn again(bytes: &[u8]) -> Result<(Header, Vec<u8>), FormatError> {
    let mut reader = Reader::new(bytes)?;
    let header = reader.header().clone();
    let mut writer = Writer::new(Vec::new(), &header)?;
    let mut at = 0;
    while let Some((offset, change)) = reader.next_change()? {
        let length = match change {
            Change::Data(bytes) => bytes.len() as u64,
            Change::Zeros(length) => length,
        };
        assert!(offset >= at && length > 0 && offset + length <= header.size);
        assert!(matches!(change, Change::Zeros(_)) || length <= MAX_DATA as u64);
        at = offset + length;
        writer.change(offset, change)?;
    }
    Ok((header, writer.finish()?))
}
