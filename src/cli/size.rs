//! Sizes: `512M`, `1G`.

use crate::memory::ram::GRANULE;

/// Reads a number of bytes, with K, M, G or T for powers of 1024.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix {
        "" | "B" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(explain()),
    };
    let number: u64 = number.parse().map_err(|_| explain())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than any machine has"))
}

/// A guest's RAM as the command line gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// In bytes, a multiple of [`GRANULE`].
    pub size: u64,
    /// Whether it is held in the host's memory.
    pub lock: bool,
}

/// Reads the size of a guest's RAM, which comes in huge pages, and what is to be done about it.
pub(super) fn parse_memory(text: &str) -> Result<Memory, String> {
    let (size, options) = text.split_once(',').unwrap_or((text, "lock=off"));
    let lock = match options {
        "lock=on" => true,
        "lock=off" => false,
        _ => return Err(format!("memory is SIZE[,lock=on|off], without '{options}'")),
    };
    match parse(size)? {
        size if size > 0 && size.is_multiple_of(GRANULE) => Ok(Memory { size, lock }),
        _ => Err("guest memory is a multiple of 2M".into()),
    }
}

fn explain() -> String {
    "a size is a whole number of bytes, or one with K, M, G or T: 512M, 1G".into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn suffixes_and_nonsense() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("3k"), Ok(3072));
        assert_eq!(parse_memory("512M"), Ok(Memory { size: 512 << 20, lock: false }));
        assert_eq!(parse_memory("2M,lock=on"), Ok(Memory { size: 2 << 20, lock: true }));
        for bad in ["", "M", "-1M", "1.5G", "1 G", "1GiB", "0x10", "17000000T", "99999999999999999999"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        for bad in ["0", "1M", "3M", "2M,", "2M,lock", "2M,lock=yes", "lock=on", "2M,lock=on,lock=on"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC*") {
            let _ = parse(&text);
        }

        #[test]
        fn number_and_suffix_multiply(number in 0_u64..1 << 20, suffix in 0_usize..5) {
            let (text, shift) = [("", 0), ("K", 10), ("M", 20), ("G", 30), ("T", 40)][suffix];
            prop_assert_eq!(parse(&format!("{number}{text}")), Ok(number << shift));
        }
    }
}
