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
    /// Whether it is made of hugetlb pages.
    pub hugepages: bool,
}

/// Reads the size of a guest's RAM, which comes in huge pages, and what is to be done about it.
pub(super) fn parse_memory(text: &str) -> Result<Memory, String> {
    let mut parts = text.split(',');
    let size = parse(parts.next().unwrap_or_default())?;
    if size == 0 || !size.is_multiple_of(GRANULE) {
        return Err("guest memory is a multiple of 2M".into());
    }
    let (mut lock, mut hugepages) = (None, None);
    for option in parts {
        let before = match option {
            "lock=on" => lock.replace(true),
            "lock=off" => lock.replace(false),
            "hugepages=2M" => hugepages.replace(true),
            _ => return Err(format!("memory is SIZE[,lock=on|off][,hugepages=2M], without '{option}'")),
        };
        if before.is_some() {
            return Err(format!("'{option}': each option of memory is given once"));
        }
    }
    Ok(Memory { size, lock: lock.unwrap_or(false), hugepages: hugepages.unwrap_or(false) })
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
        let memory = |size, lock, hugepages| Ok(Memory { size, lock, hugepages });
        assert_eq!(parse_memory("512M"), memory(512 << 20, false, false));
        assert_eq!(parse_memory("2M,lock=on"), memory(2 << 20, true, false));
        assert_eq!(parse_memory("1G,hugepages=2M"), memory(1 << 30, false, true));
        assert_eq!(parse_memory("1G,hugepages=2M,lock=on"), memory(1 << 30, true, true));
        assert_eq!(parse_memory("1G,lock=off,hugepages=2M"), memory(1 << 30, false, true));
        for bad in ["", "M", "-1M", "1.5G", "1 G", "1GiB", "0x10", "17000000T", "99999999999999999999"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let bad =
            ["", "0", "1M", "3M", "2M,", "2M,lock", "2M,lock=yes", "lock=on", "2M,lock=on,lock=on", "2M,hugepages=1G", "2M,hugepages"];
        for bad in bad {
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
