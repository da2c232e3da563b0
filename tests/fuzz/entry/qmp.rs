//! The control socket: a client's stream, cut into requests.

use ferry::qmp::request::parse;
use ferry::qmp::splitter::{MAX_LENGTH, Splitter};

pub fn run(data: &[u8]) {
    let mut splitter = Splitter::default();
    for byte in data {
        if let Some(Ok(object)) = splitter.push(*byte) {
            assert!(object.len() <= MAX_LENGTH);
            if let (_, Err(error)) = parse(&object) {
                assert!(!error.desc.is_empty());
            }
        }
    }
}
