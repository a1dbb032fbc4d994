//! Formats dates as Python's `strftime` does, in English and UTC.

use std::time::SystemTime;

use jiff::Timestamp;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use jiff::tz::TimeZone;

/// Formats a point in time. Unknown directives are left unchanged.
pub(super) fn format(now: SystemTime, format: &str) -> String {
    // The calendar ends with the year 9999.
    let now = Timestamp::try_from(now).unwrap_or(Timestamp::MAX);
    // Whole seconds, so that a prompt with `%f` does not differ with each request.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(Timestamp::UNIX_EPOCH);
    let date = BrokenDownTime::from(&now.to_zoned_datetime(TimeZone::UTC));
    let config = Config::new().custom(PosixCustom::new()).lenient(true);
    let mut written = String::with_capacity(format.len() + 16);
    // A lenient format has no errors, and writing to a string cannot fail.
    let _ = date.format_with_config(&config, pythonic(format), &mut written);
    written
}

/// Rewrites the directives that Python understands in another way: its dates have no time zone unless one is given, and
/// six digits of a second's fraction.
fn pythonic(format: &str) -> String {
    let mut written = String::with_capacity(format.len());
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            written.push(character);
            continue;
        }
        match characters.next() {
            Some('z' | 'Z') => {}
            Some('f') => written.push_str("%6f"),
            other => {
                written.push('%');
                written.extend(other);
            }
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(secs: u64, text: &str) -> String {
        format(SystemTime::UNIX_EPOCH + Duration::from_secs(secs), text)
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S"), "Thursday 01 January 1970 00:00:00");
        assert_eq!(at(1_709_210_096, "%a %-d %b %y, day %j, %I:%M %p"), "Thu 29 Feb 24, day 060, 12:34 PM");
        assert_eq!(at(4_102_444_799, "%Y-%m-%d"), "2099-12-31");
        assert_eq!(at(951_782_400, "%d.%-m.%Y 100%% %J%"), "29.2.2000 100% %J%");
        assert_eq!(at(1_709_210_096, "%F %T %D %R %r"), "2024-02-29 12:34:56 02/29/24 12:34 12:34:56 PM");
        assert_eq!(at(1_709_556_996, "%e|%-e|%k|%l|%h|%u|%w|%U|%W|%C"), " 4|4|12|12|Mar|1|1|09|10|20");
        assert_eq!(
            at(1_709_556_996, "%c|%x|%X|%Z%z|%s|%P"),
            "Mon Mar  4 12:56:36 2024|03/04/24|12:56:36||1709556996|pm"
        );
        assert_eq!(at(1 << 40, "%Y"), "9999", "a far future is written too");
    }

    #[test]
    fn a_second_has_no_fraction_and_an_escaped_directive_stays() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_500);
        assert_eq!(format(now, "%S.%f %%f %%Z%n%t|"), "01.000000 %f %Z\n\t|");
    }

    #[test]
    fn any_format_costs_bounded_memory() {
        assert!(at(0, "%99999999999Y %255d %-é % %").len() < 1_000);
        assert_eq!(at(0, ""), "");
    }
}
