//! What a disk block is expected to hold, packed into the 32 bits that the table in RAM has for it: state in
//! bits 31:30, generation of the latest write in bits 29:0.

/// State of one disk block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Not written by this run, or discarded: anything.
    Unknown,
    /// The block of this generation.
    Data,
    /// Zeros, from a write-zeroes request.
    Zeros,
}

/// Expected content of one block and the generation of its latest write (0 if there was none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// What it holds.
    pub content: Content,
    /// Below 2^30.
    pub generation: u32,
}

const GENERATION: u32 = (1 << 30) - 1;

impl Block {
    /// From the table: 0 is unknown, 1 data, 2 zeros.
    pub fn unpack(entry: u32) -> Self {
        let content = match entry >> 30 {
            1 => Content::Data,
            2 => Content::Zeros,
            _ => Content::Unknown,
        };
        Block {
            content,
            generation: entry & GENERATION,
        }
    }

    /// For the table.
    pub fn pack(self) -> u32 {
        let content = match self.content {
            Content::Unknown => 0,
            Content::Data => 1,
            Content::Zeros => 2,
        };
        content << 30 | (self.generation & GENERATION)
    }

    /// After one more write.
    pub fn written(self) -> Self {
        Block {
            content: Content::Data,
            generation: (self.generation + 1) & GENERATION,
        }
    }
}

#[cfg(test)]
mod tests;
