//! Pages that say what they are: an owner's number, a generation, and contents that follow from both.

/// Bytes in a [`Page`], and the alignment that O_DIRECT asks for.
pub const PAGE_SIZE: usize = 4096;
const WORDS: usize = PAGE_SIZE / 8;
const NUMBER: usize = 0;
const GENERATION: usize = 1;

/// One page of memory, or block of a file.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page([u64; WORDS]);

/// The contents' first word, from which the others are computed.
fn key(number: u64, generation: u64) -> u64 {
    // The finaliser of SplitMix64: every bit of the input changes half of the output's.
    let mut key = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ generation;
    key = (key ^ (key >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    key = (key ^ (key >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ (key >> 31)
}

fn word(key: u64, index: usize) -> u64 {
    (key ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Page {
    /// A page of zeroes, which no [`Page::check`] takes for good.
    pub const ZERO: Page = Page([0; WORDS]);

    /// Writes the whole page.
    pub fn fill(&mut self, number: u64, generation: u64) {
        let key = key(number, generation);
        for (index, slot) in self.0.iter_mut().enumerate() {
            *slot = word(key, index);
        }
        self.0[NUMBER] = number;
        self.0[GENERATION] = generation;
    }

    /// The generation that the page claims to be of.
    pub fn generation(&self) -> u64 {
        self.0[GENERATION]
    }

    /// Compares every word with what [`Page::fill`] wrote; the error says what is there instead.
    pub fn check(&self, number: u64, generation: u64) -> Result<(), String> {
        match self.first_difference(number, generation) {
            None => Ok(()),
            Some(offset) => {
                let (claimed_number, claimed_generation) = (self.0[NUMBER], self.0[GENERATION]);
                let found = if self.0.iter().all(|&word| word == 0) {
                    "zeroes".to_owned()
                } else if self
                    .first_difference(claimed_number, claimed_generation)
                    .is_none()
                {
                    format!("a whole page {claimed_number:#x} of generation {claimed_generation}")
                } else {
                    format!("a torn page (claims {claimed_number:#x}, generation {claimed_generation}; differs from byte {offset} on)")
                };
                Err(format!(
                    "page {number:#x} should be of generation {generation} but holds {found}"
                ))
            }
        }
    }

    /// Offset in bytes of the first word that is not what `fill(number, generation)` writes.
    fn first_difference(&self, number: u64, generation: u64) -> Option<usize> {
        let key = key(number, generation);
        let position = self.0.iter().enumerate().position(|(index, &found)| {
            found
                != match index {
                    NUMBER => number,
                    GENERATION => generation,
                    _ => word(key, index),
                }
        });
        position.map(|index| index * 8)
    }
}

/// The pages' bytes, for writing them to a file.
pub fn as_bytes(pages: &[Page]) -> &[u8] {
    // SAFETY: a Page is PAGE_SIZE initialised bytes without padding, and u8 has no alignment.
    unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), std::mem::size_of_val(pages)) }
}

/// The pages' bytes, for reading a file into them.
pub fn as_bytes_mut(pages: &mut [Page]) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; every pattern of bytes is a valid Page, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), std::mem::size_of_val(pages)) }
}

const _: () = assert!(std::mem::size_of::<Page>() == PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_stale_torn_and_zeroed_pages_apart() {
        let mut page = Page::ZERO;
        assert!(page.check(0, 0).unwrap_err().contains("zeroes"));
        page.fill(7, 3);
        assert_eq!(page.check(7, 3), Ok(()));
        assert!(page
            .check(7, 4)
            .unwrap_err()
            .contains("a whole page 0x7 of generation 3"));
        assert!(page.check(8, 3).unwrap_err().contains("a whole page 0x7"));
        let mut newer = Page::ZERO;
        newer.fill(7, 4);
        as_bytes_mut(std::slice::from_mut(&mut page))[2048..]
            .copy_from_slice(&as_bytes(std::slice::from_ref(&newer))[2048..]);
        assert!(page.check(7, 3).unwrap_err().contains("torn"));
        assert!(page.check(7, 3).unwrap_err().contains("byte 2048"));
    }

    #[test]
    fn notices_every_single_bit() {
        let mut page = Page::ZERO;
        page.fill(1, 1);
        for bit in 0..PAGE_SIZE * 8 {
            as_bytes_mut(std::slice::from_mut(&mut page))[bit / 8] ^= 1 << (bit % 8);
            assert!(page.check(1, 1).is_err(), "bit {bit}");
            as_bytes_mut(std::slice::from_mut(&mut page))[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
