//! Frames: one header and body.

use ferry::migrate::compression::Decompressor;
use ferry::migrate::wire::{Frame, HEADER_SIZE, Header};

use super::allocation::{proportionate, within};

pub fn run(data: &[u8]) {
    let Some((header, body)) = data.split_first_chunk::<HEADER_SIZE>() else { return };
    let Ok(header) = Header::decode(*header) else { return };
    assert!(header.length <= header.kind.max_length());
    let body = &body[..body.len().min(header.length)];
    let Ok(frame) = within(proportionate(body.len()), || Frame::decode(header, body)) else { return };
    assert_eq!(frame.kind(), header.kind);
    if let Frame::Compressed(compressed) = &frame {
        let mut contents = vec![0; compressed.run.bytes() as usize];
        let _ = Decompressor::default().decompress(compressed.method, &compressed.contents, &mut contents);
    }
    let Ok(encoded) = frame.encode() else { return };
    let (again, body) = encoded.split_first_chunk::<HEADER_SIZE>().expect("a header");
    let again = Header::decode(*again).expect("what was encoded decodes");
    assert_eq!(Frame::decode(again, body), Ok(frame));
}
