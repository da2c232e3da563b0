//! What tells one backup from another.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::sparse::CLUSTER;

/// A backup's id: 16 bytes, for people as 32 hexadecimal digits. That of an incremental one is random and is kept in it. A full one is a plain
/// image with no place for an id; its id is its [`Fingerprint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BackupId(pub [u8; 16]);

impl BackupId {
    /// One that nobody else has. An error where the system has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes).map(|()| BackupId(bytes))
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for BackupId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let plain = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let number = if plain { u128::from_str_radix(text, 16).map_err(drop)? } else { return Err(()) };
        Ok(BackupId(number.to_be_bytes()))
    }
}

/// Makes the id of a full backup from its content, wherever it has holes: the beginning of a SHA-256 of its size and of the number and content
/// of each cluster that is not all zeros, in ascending order.
#[derive(Clone, Debug)]
pub struct Fingerprint(Sha256);

impl Fingerprint {
    /// Of an image of `size` bytes.
    pub fn new(size: u64) -> Self {
        Fingerprint(Sha256::new_with_prefix(size.to_le_bytes()))
    }

    /// Takes in the cluster at `offset`, which is not all zeros and comes after those before.
    pub fn add(&mut self, cluster: &[u8], offset: u64) {
        self.0.update((offset / CLUSTER).to_le_bytes());
        self.0.update(cluster);
    }

    /// The id.
    pub fn id(self) -> BackupId {
        let hash: [u8; 32] = self.0.finalize().into();
        let mut id = [0; 16];
        id.iter_mut().zip(hash).for_each(|(to, from)| *to = from);
        BackupId(id)
    }
}
