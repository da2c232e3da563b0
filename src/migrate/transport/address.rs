//! Where to listen or to connect to, as people write it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// `tcp:HOST:PORT` (an IPv6 address in brackets) or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A TCP port.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 lets the kernel choose one to listen on.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// The text is no address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not an address: write tcp:HOST:PORT, tcp:[IPV6]:PORT or unix:PATH")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parsed = match text.split_once(':') {
            Some(("tcp", rest)) => parse_tcp(rest),
            // A zero byte would end the path early.
            Some(("unix", path)) if !path.is_empty() && !path.contains('\0') => Some(Address::Unix(path.into())),
            _ => None,
        };
        parsed.ok_or_else(|| AddressError(text.to_owned()))
    }
}

fn parse_tcp(text: &str) -> Option<Address> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']')?,
        // Without brackets nobody knows which colon ends an IPv6 address.
        None if host.contains(':') => return None,
        None => host,
    };
    // `u16::from_str` takes a sign, which no port has.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| digits)?;
    (!host.is_empty()).then(|| Address::Tcp { host: host.to_owned(), port })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
