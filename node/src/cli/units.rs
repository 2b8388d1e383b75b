//! Parses rates, sizes, quotas and durations on the command line.

use std::time::Duration;

/// Parses a rate in bytes per second: a number, with k, M or G for thousands, millions or billions.
pub(super) fn rate(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "{text:?} is not a rate: give bytes per second, such as 500k, 40M or 1.5G; 0 is no limit"
        )
    };
    let number = text.trim_end_matches("/s").trim_end_matches(['b', 'B']);
    let (number, unit) = match number.char_indices().next_back() {
        Some((at, 'k' | 'K')) => (&number[..at], 1e3),
        Some((at, 'm' | 'M')) => (&number[..at], 1e6),
        Some((at, 'g' | 'G')) => (&number[..at], 1e9),
        _ => (number, 1.0),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let rate = number * unit;
    // A rate below one byte per second would be rounded to 0, which means no limit.
    match rate == 0.0 || (1.0..1e15).contains(&rate) {
        true => Ok(rate as u64),
        false => Err(wrong()),
    }
}

/// The quota of fetched content, in bytes; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Quota(pub(crate) Option<u64>);

/// Parses a quota: bytes as [`bytes`] parses them, or `none`.
pub(super) fn quota(text: &str) -> Result<Quota, String> {
    if text.eq_ignore_ascii_case("none") {
        return Ok(Quota(None));
    }
    let wrong =
        |_| format!("{text:?} is not a quota: give bytes, such as 500M, 100GB or 64GiB, or none");
    bytes(text).map(|bytes| Quota(Some(bytes))).map_err(wrong)
}

/// Parses a size in bytes: a number, with k, M, G or T for powers of 1,000, or Ki, Mi, Gi or Ti for powers of 1,024.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: give bytes, such as 500M, 100GB or 64GiB");
    let number = text.trim_end_matches(['b', 'B']);
    let (number, base) = match number.strip_suffix('i') {
        Some(number) => (number, 1024_f64),
        None => (number, 1000.0),
    };
    let power = |c: char| "kmgt".find(c.to_ascii_lowercase()).map(|at| at as i32 + 1);
    let (digits, unit) = match number.char_indices().next_back() {
        Some((at, c)) => match power(c) {
            Some(power) => (&number[..at], base.powi(power)),
            None => (number, 1.0),
        },
        None => return Err(wrong()),
    };
    let bytes = digits.trim().parse::<f64>().map_err(|_| wrong())? * unit;
    match (0.0..1e18).contains(&bytes) {
        true => Ok(bytes as u64),
        false => Err(wrong()),
    }
}

/// Parses a duration: `90s`, `10m`, `1h`, `2d`, or a number of seconds.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err("give a duration such as 90s, 10m, 1h or 2d".to_owned()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "give a duration such as 90s, 10m, 1h or 2d".to_owned())?;
    let seconds = number.checked_mul(unit).ok_or("the duration is too long")?;
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_bytes_with_a_unit_or_none() {
        for (text, bytes) in [
            ("0", 0),
            ("1500", 1500),
            ("500k", 500_000),
            ("1.5M", 1_500_000),
            ("100GB", 100_000_000_000),
            ("2TiB", 2 << 40),
            ("64 Gi", 64 << 30),
        ] {
            assert_eq!(quota(text), Ok(Quota(Some(bytes))), "{text}");
        }
        assert_eq!(quota("none"), Ok(Quota(None)));
        for bad in ["", "B", "GB", "-1", "ten", "1E", "nan", "inf", "1e30"] {
            assert!(quota(bad).is_err(), "{bad}");
        }
    }
}
