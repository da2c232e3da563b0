//! Cuts a client's byte stream into JSON objects, which need no line ends between them.
//!
//! The stream is not to be trusted: objects are bounded in size and depth. After anything that cannot be JSON the rest is skipped up to
//! the next line end, other control character or byte that UTF-8 never has, as QEMU's parser does, so that a client can recover from
//! half a command.

use thiserror::Error;

/// Longest object, in bytes. Commands are far shorter.
pub const MAX_LENGTH: usize = 256 << 10;
/// Deepest nesting. serde_json would stop at 128 by itself.
pub const MAX_DEPTH: usize = 64;

/// Why the stream was cut off in the middle of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SplitError {
    /// A value that is not an object, or no value at all.
    #[error("QMP input must be a JSON object")]
    NotAnObject,
    /// A byte that JSON does not have there.
    #[error("JSON parse error, stray byte {0:#04x}")]
    Stray(u8),
    /// More than [`MAX_DEPTH`] brackets.
    #[error("JSON nesting is deeper than {MAX_DEPTH}")]
    Depth,
    /// More than [`MAX_LENGTH`] bytes.
    #[error("JSON object is longer than {MAX_LENGTH} bytes")]
    Length,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Between,
    Inside,
    InString,
    Escaped,
    Skipping,
}

/// The cutter's state between two reads.
#[derive(Debug, Default)]
pub struct Splitter {
    state: State,
    object: Vec<u8>,
    /// The closing brackets that are due, innermost last.
    closers: Vec<u8>,
}

impl Splitter {
    /// Takes the next byte; gives an object when this byte completes one. Its brackets and strings match, the rest is for a parser to see.
    pub fn push(&mut self, byte: u8) -> Option<Result<Vec<u8>, SplitError>> {
        if self.state == State::Between && matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
            return None;
        }
        if self.state == State::Skipping {
            self.skip(byte);
            return None;
        }
        match self.step(byte) {
            Ok(false) => None,
            Ok(true) => Some(Ok(std::mem::take(&mut self.object))),
            Err(error) => {
                self.object = Vec::new();
                self.closers.clear();
                self.skip(byte);
                Some(Err(error))
            }
        }
    }

    /// Whether `byte` completed an object.
    fn step(&mut self, byte: u8) -> Result<bool, SplitError> {
        if self.object.len() == MAX_LENGTH {
            return Err(SplitError::Length);
        }
        let next = match (self.state, byte) {
            (State::Between, b'{') => self.open(b'}')?,
            (State::Between, _) => return Err(SplitError::NotAnObject),
            (State::Inside, b'{') => self.open(b'}')?,
            (State::Inside, b'[') => self.open(b']')?,
            (State::Inside, b'}' | b']') if self.closers.pop() != Some(byte) => return Err(SplitError::Stray(byte)),
            (State::Inside, b'}' | b']') if self.closers.is_empty() => State::Between,
            (State::Inside, b'"') => State::InString,
            (State::Inside, b'\t' | b'\r' | b'\n') => State::Inside,
            (State::Inside | State::InString | State::Escaped, 0..0x20 | 0xfe..) => return Err(SplitError::Stray(byte)),
            (State::InString, b'"') => State::Inside,
            (State::InString, b'\\') => State::Escaped,
            (State::Escaped, _) => State::InString,
            (state, _) => state,
        };
        self.state = next;
        self.object.push(byte);
        Ok(next == State::Between)
    }

    fn open(&mut self, closer: u8) -> Result<State, SplitError> {
        if self.closers.len() == MAX_DEPTH {
            return Err(SplitError::Depth);
        }
        self.closers.push(closer);
        Ok(State::Inside)
    }

    fn skip(&mut self, byte: u8) {
        let resynchronised = byte != b'\t' && matches!(byte, 0..0x20 | 0xfe..);
        self.state = if resynchronised { State::Between } else { State::Skipping };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(stream: &[u8]) -> Vec<Result<String, SplitError>> {
        let mut splitter = Splitter::default();
        let items = stream.iter().filter_map(|byte| splitter.push(*byte));
        items.map(|item| item.map(|object| String::from_utf8(object).unwrap())).collect()
    }

    #[test]
    fn objects_need_nothing_between_them_and_may_span_lines() {
        let objects = [r#"{"a":"}{\"\\"}"#, "{\n\t\"b\": [1, {}]\r\n}", "{}"];
        for separator in ["", "\n", " \r\n\n"] {
            assert_eq!(split(objects.join(separator).as_bytes()), objects.map(|object| Ok(object.to_string())));
        }
    }

    #[test]
    fn one_error_for_one_stretch_of_garbage_and_then_the_next_command() {
        let garbage: [(&[u8], SplitError); 7] = [
            (b"{]\n", SplitError::Stray(b']')),
            (b"{\xff", SplitError::Stray(0xff)),
            (b"{\x01", SplitError::Stray(1)),
            (b"{\"half a string\n", SplitError::Stray(b'\n')),
            (b"GET / HTTP/1.1\r", SplitError::NotAnObject),
            (b"[{\"execute\": \"stop\"}]\n", SplitError::NotAnObject),
            (b"\x16\x03\x01", SplitError::NotAnObject),
        ];
        for (bytes, error) in garbage {
            let items = split(&[bytes, b"{}"].concat());
            assert_eq!(items.last(), Some(&Ok("{}".to_string())), "{bytes:?}");
            assert_eq!(items[0], Err(error));
        }
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let deep = "{\"a\":".repeat(10_000) + "\n{}";
        assert_eq!(split(deep.as_bytes()), [Err(SplitError::Depth), Ok("{}".to_string())]);
        let long = "{\"a\":\"".to_string() + &"x".repeat(3 * MAX_LENGTH) + "\"}\n{}";
        assert_eq!(split(long.as_bytes()), [Err(SplitError::Length), Ok("{}".to_string())]);
    }

    proptest! {
        #[test]
        fn any_stream_is_survived_within_bounds(stream in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'{'), Just(b'}'), Just(b'"')], 0..500)) {
            let mut splitter = Splitter::default();
            for byte in &stream {
                if let Some(Ok(object)) = splitter.push(*byte) {
                    let whole = object.starts_with(b"{") && object.ends_with(b"}");
                    prop_assert!(object.len() <= stream.len() && whole);
                }
                prop_assert!(splitter.object.len() <= MAX_LENGTH && splitter.closers.len() <= MAX_DEPTH);
            }
            // The impossible byte resynchronises from everywhere.
            splitter.push(0xff);
            prop_assert_eq!(splitter.push(b'{'), None);
            prop_assert_eq!(splitter.push(b'}'), Some(Ok(b"{}".to_vec())));
        }
    }
}
