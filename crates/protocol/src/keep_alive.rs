//! How long a model stays in memory without work, as clients and operators write it, in Ollama's format.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// A time in seconds; -1 means for ever, and 0 means not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive(pub i64);

/// The expected format, for error messages.
const EXPECTED: &str = "write seconds, or a time such as 30s, 5m or 1h30m; -1 keeps it for ever, and 0 not at all";

impl std::str::FromStr for KeepAlive {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(secs) = text.parse::<f64>() {
            return of_seconds(secs).ok_or(EXPECTED);
        }
        let (is_negative, mut rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let mut secs = 0.0;
        while !rest.is_empty() {
            let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or(EXPECTED)?;
            let number: f64 = rest[..end].parse().map_err(|_| EXPECTED)?;
            rest = &rest[end..];
            let end = rest.find(|letter: char| letter.is_ascii_digit()).unwrap_or(rest.len());
            secs += number
                * match &rest[..end] {
                    "ms" => 0.001,
                    "s" => 1.0,
                    "m" => 60.0,
                    "h" => 3_600.0,
                    _ => return Err(EXPECTED),
                };
            rest = &rest[end..];
        }
        of_seconds(if is_negative { -secs } else { secs }).filter(|_| !text.is_empty() && text != "-").ok_or(EXPECTED)
    }
}

/// Rounds up to whole seconds. Negative numbers mean for ever.
fn of_seconds(secs: f64) -> Option<KeepAlive> {
    match secs {
        _ if !secs.is_finite() => None,
        _ if secs < 0.0 => Some(KeepAlive(-1)),
        _ => Some(KeepAlive(secs.ceil().min(f64::from(u32::MAX)) as i64)),
    }
}

impl<'de> Deserialize<'de> for KeepAlive {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected seconds, or a time such as \"5m\"")]
        enum Written {
            Seconds(f64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Seconds(secs) => of_seconds(secs).ok_or_else(|| D::Error::custom(EXPECTED)),
            Written::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_seconds_or_what_people_write() {
        for (text, secs) in [
            ("300", 300),
            ("5m", 300),
            ("1h30m", 5_400),
            ("1.5h", 5_400),
            ("90s", 90),
            ("500ms", 1),
            ("0", 0),
            ("0s", 0),
            ("-1", -1),
            ("-5m", -1),
            ("1e30", i64::from(u32::MAX)),
        ] {
            assert_eq!(text.parse(), Ok(KeepAlive(secs)), "{text}");
        }
        for text in ["", "-", "m", "5", "5x", "5m3", "nan", "inf", "5 m"].into_iter().filter(|text| *text != "5") {
            assert_eq!(text.parse::<KeepAlive>(), Err(EXPECTED), "{text}");
        }
    }

    #[test]
    fn json_has_numbers_and_texts() {
        let read = |text: &str| serde_json::from_str::<KeepAlive>(text).map(|KeepAlive(secs)| secs).ok();
        assert_eq!([read("300"), read("\"5m\""), read("-1"), read("0")], [Some(300), Some(300), Some(-1), Some(0)]);
        assert_eq!([read("true"), read("\"soon\""), read("{}")], [None; 3]);
    }
}
