//! `--serial`.

use std::path::PathBuf;
use std::str::FromStr;

/// Where a guest's serial console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    /// Ferry's own standard input and output.
    Stdio,
    /// Nowhere; there is no input.
    Null,
    /// Output to a file, which is emptied first; there is no input.
    File(PathBuf),
    /// Input and output over a listening unix socket, one client at a time. Output without a client is lost.
    Unix(PathBuf),
}

impl FromStr for SerialTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(SerialTarget::Stdio),
            None if text == "null" => Ok(SerialTarget::Null),
            Some(("file", path)) if !path.is_empty() => Ok(SerialTarget::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(SerialTarget::Unix(path.into())),
            _ => Err("a serial console is stdio, null, file:PATH or unix:PATH".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_their_misspellings() {
        assert_eq!("stdio".parse(), Ok(SerialTarget::Stdio));
        assert_eq!("null".parse(), Ok(SerialTarget::Null));
        assert_eq!("file:a:b".parse(), Ok(SerialTarget::File("a:b".into())));
        assert_eq!("unix:/x".parse(), Ok(SerialTarget::Unix("/x".into())));
        for bad in ["", "file:", "unix:", "pty", "stdio:", "file"] {
            assert!(bad.parse::<SerialTarget>().is_err(), "{bad}");
        }
    }
}
