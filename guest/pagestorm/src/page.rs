//! The contents of pages and disk blocks: 512 little-endian 64-bit words.
//!
//! | word | meaning |
//! |---|---|
//! | 0 | number of the page or block |
//! | 1 | generation: how many times it has been written |
//! | 2 | checksum over the other 511 words ([`checksum`]) |
//! | 3 | magic: [`PAGE_MAGIC`], or the disk magic that the `disk` line prints |
//! | 4.. | body, derived from magic, number and generation alone |
//!
//! The body is derived rather than stored elsewhere, so that a page made up of two generations is
//! noticed even where its checksum was copied with it.

/// Bytes in a page and in a disk block.
pub const PAGE_SIZE: usize = 4096;
/// 64-bit words in a page.
pub const WORDS: usize = PAGE_SIZE / 8;
/// Words before the body.
pub const HEADER_WORDS: usize = 4;
/// Word 3 of every page in RAM ("PSTMPAGE").
pub const PAGE_MAGIC: u64 = u64::from_le_bytes(*b"PSTMPAGE");
/// The upper half of word 3 of every disk block ("DISK"); the lower half differs from run to run.
pub const DISK_MAGIC: u64 = (u32::from_le_bytes(*b"DISK") as u64) << 32;

/// A page or block as words.
pub type Words = [u64; WORDS];

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
const LANES: usize = 4;

/// How a body looks to a compressor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// The same 64 bytes again and again.
    Compressible,
    /// Every word different; no compressor gains anything.
    Random,
}

/// What a page says it is, and from which its whole contents follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Word 3.
    pub magic: u64,
    /// Word 0.
    pub number: u64,
    /// Word 1.
    pub generation: u32,
}

/// What is wrong with a page; offsets are bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It was to be all zero.
    NotZero {
        /// Of the first word that is not zero.
        offset: usize,
    },
    /// It is all zero though it has been written.
    Zeroed,
    /// Word 3 is none that this run writes.
    Magic {
        /// What word 3 holds.
        found: u64,
    },
    /// Another page's contents.
    Number {
        /// Whose contents these are.
        found: u64,
    },
    /// A whole page of an older generation: a write was lost, or the generation went backwards.
    Stale {
        /// Its generation.
        found: u64,
    },
    /// A whole page of a newer generation than the table has: the table is stale.
    Ahead {
        /// Its generation.
        found: u64,
    },
    /// The body does not belong to the header, or the header is neither whole nor expected.
    Torn {
        /// Of the first word that is not what was expected.
        offset: usize,
    },
}

impl Damage {
    /// The word for it in a verdict line.
    pub fn reason(&self) -> &'static str {
        match self {
            Damage::NotZero { .. } => "not_zero",
            Damage::Zeroed => "zeroed",
            Damage::Magic { .. } => "magic",
            Damage::Number { .. } => "number",
            Damage::Stale { .. } => "stale",
            Damage::Ahead { .. } => "ahead",
            Damage::Torn { .. } => "torn",
        }
    }

    /// Byte offset in the page at which the damage shows.
    pub fn offset(&self) -> usize {
        match *self {
            Damage::NotZero { offset } | Damage::Torn { offset } => offset,
            Damage::Zeroed | Damage::Number { .. } => 0,
            Damage::Stale { .. } | Damage::Ahead { .. } => 8,
            Damage::Magic { .. } => 24,
        }
    }
}

/// Scatters the bits of `value`; a bijection.
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 32)).wrapping_mul(MULTIPLIER);
    let value = (value ^ (value >> 29)).wrapping_mul(MULTIPLIER);
    value ^ (value >> 32)
}

impl Stamp {
    fn seed(&self) -> u64 {
        mix(self.magic ^ mix(self.number ^ mix(u64::from(self.generation))))
    }
}

#[inline(always)]
fn body_word(seed: u64, index: usize, body: Body) -> u64 {
    let index = match body {
        Body::Compressible => index % 8,
        Body::Random => index,
    };
    let word = seed.wrapping_add((index as u64).wrapping_mul(MULTIPLIER));
    (word ^ (word >> 29)).wrapping_mul(MULTIPLIER)
}

#[inline(always)]
fn absorb(lanes: &mut [u64; LANES], lane: usize, word: u64) {
    lanes[lane] = (lanes[lane] ^ word)
        .wrapping_mul(MULTIPLIER)
        .rotate_left(23);
}

fn finish(lanes: [u64; LANES]) -> u64 {
    lanes.iter().fold(0, |sum, lane| mix(sum ^ lane))
}

/// The checksum of a page, taking word 2 as zero. Word i goes into lane i % 4 as
/// `lane = rotate_left((lane ^ word) * 0x9e3779b97f4a7c15, 23)`; lanes start at zero and are folded with
/// [`mix`].
pub fn checksum(words: &Words) -> u64 {
    let mut lanes = [0; LANES];
    for (index, &word) in words.iter().enumerate() {
        absorb(&mut lanes, index % LANES, if index == 2 { 0 } else { word });
    }
    finish(lanes)
}

/// Fills a page with the contents that `stamp` and `body` stand for.
pub fn write(words: &mut Words, stamp: Stamp, body: Body) {
    words[0] = stamp.number;
    words[1] = u64::from(stamp.generation);
    words[3] = stamp.magic;
    words[2] = for_each_body_word(stamp, body, |index, word| words[index] = word);
}

/// Calls `visit(index, word)` for each word of the body, and returns the checksum of the page.
#[inline(always)]
fn for_each_body_word(stamp: Stamp, body: Body, mut visit: impl FnMut(usize, u64)) -> u64 {
    let seed = stamp.seed();
    let mut lanes = [0; LANES];
    absorb(&mut lanes, 0, stamp.number);
    absorb(&mut lanes, 1, u64::from(stamp.generation));
    absorb(&mut lanes, 2, 0);
    absorb(&mut lanes, 3, stamp.magic);
    for group in (HEADER_WORDS..WORDS).step_by(LANES) {
        for lane in 0..LANES {
            let word = body_word(seed, group + lane, body);
            visit(group + lane, word);
            absorb(&mut lanes, lane, word);
        }
    }
    finish(lanes)
}

/// Checks that a page holds exactly what `stamp` and `body` stand for.
///
/// # Errors
/// What is wrong with it.
pub fn check(words: &Words, stamp: Stamp, body: Body) -> Result<(), Damage> {
    let mut difference = (words[0] ^ stamp.number)
        | (words[1] ^ u64::from(stamp.generation))
        | (words[3] ^ stamp.magic);
    let sum = for_each_body_word(stamp, body, |index, word| difference |= words[index] ^ word);
    if difference | (words[2] ^ sum) == 0 {
        Ok(())
    } else {
        Err(diagnose(words, stamp, body))
    }
}

/// Checks that a page is all zero.
///
/// # Errors
/// [`Damage::NotZero`] with the first offset.
pub fn check_zero(words: &Words) -> Result<(), Damage> {
    if words.iter().fold(0, |all, word| all | word) == 0 {
        return Ok(());
    }
    let index = words.iter().position(|&word| word != 0).unwrap_or(0);
    Err(Damage::NotZero { offset: index * 8 })
}

#[cold]
fn diagnose(words: &Words, stamp: Stamp, body: Body) -> Damage {
    if check_zero(words).is_ok() {
        return Damage::Zeroed;
    }
    // A page that agrees with its own checksum is a whole page, only not the expected one.
    if words[2] == checksum(words) {
        if words[3] != stamp.magic {
            return Damage::Magic { found: words[3] };
        }
        if words[0] != stamp.number {
            return Damage::Number { found: words[0] };
        }
        let (found, expected) = (words[1], u64::from(stamp.generation));
        if found < expected {
            return Damage::Stale { found };
        }
        if found > expected {
            return Damage::Ahead { found };
        }
    }
    let mut expected = [0; WORDS];
    write(&mut expected, stamp, body);
    let differs = words
        .iter()
        .zip(&expected)
        .position(|(found, wanted)| found != wanted);
    Damage::Torn {
        offset: differs.unwrap_or(0) * 8,
    }
}

#[cfg(test)]
mod tests;
