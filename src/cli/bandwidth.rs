//! Bandwidths: `1Gbit` as networks are sold, `125M` in bytes a second as in QEMU.

use super::size;

/// Reads a rate into bytes a second: a [size](super::size), or a number of Kbit, Mbit or Gbit (powers of 1000) a second.
pub(super) fn parse(text: &str) -> Result<i64, String> {
    let explain = || "a rate is a whole number with Kbit, Mbit or Gbit, or bytes a second with K, M or G: 1Gbit, 125M".to_string();
    let bytes = match text.strip_suffix("bit") {
        None => size::parse(text).map_err(|_| explain())?,
        Some(bits) => {
            let digits = bits.find(|character: char| !character.is_ascii_digit()).unwrap_or(bits.len());
            let (number, prefix) = bits.split_at(digits);
            let factor = match prefix {
                "K" | "k" => 1_000_u64,
                "M" | "m" => 1_000_000,
                "G" | "g" => 1_000_000_000,
                _ => return Err(explain()),
            };
            number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(explain)? / 8
        }
    };
    i64::try_from(bytes).map_err(|_| explain())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bits_bytes_and_nonsense() {
        assert_eq!(parse("1Gbit"), Ok(125_000_000));
        assert_eq!(parse("100Mbit"), Ok(12_500_000));
        assert_eq!(parse("125M"), Ok(125 << 20));
        assert_eq!(parse("0"), Ok(0));
        for bad in ["", "bit", "Gbit", "-1Gbit", "1bit", "1Gb", "1Gbps", "fast", "99999999999Gbit", "16777215T"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC*(bit)?") {
            let _ = parse(&text);
        }
    }
}
