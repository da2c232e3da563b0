//! Durations: `50ms`, `2s`.

use crate::qmp::parameters::MAX_DOWNTIME_LIMIT_MS;

/// Reads a downtime limit into milliseconds.
pub(super) fn parse_milliseconds(text: &str) -> Result<i64, String> {
    let explain = || "a time is a whole number with ms or s: 50ms, 2s".to_string();
    let (number, factor) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1),
        (None, Some(number)) => (number, 1000),
        (None, None) => return Err(explain()),
    };
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(explain());
    }
    let milliseconds = number.parse::<u64>().map_err(|_| explain())?.saturating_mul(factor);
    if milliseconds > MAX_DOWNTIME_LIMIT_MS {
        return Err(format!("at most {MAX_DOWNTIME_LIMIT_MS}ms"));
    }
    i64::try_from(milliseconds).map_err(|_| explain())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_and_nonsense() {
        assert_eq!(parse_milliseconds("50ms"), Ok(50));
        assert_eq!(parse_milliseconds("2s"), Ok(2000));
        for bad in ["", "50", "ms", "s", "-5ms", "+5ms", "1.5s", "5m", "5 ms", "2001s", "99999999999999999999s"] {
            assert!(parse_milliseconds(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC*(ms|s)?") {
            let _ = parse_milliseconds(&text);
        }
    }
}
