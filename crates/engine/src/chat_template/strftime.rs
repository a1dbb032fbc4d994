//! Formats dates as Python's `strftime` does, in English and UTC.

use std::fmt::Write;
use std::time::SystemTime;

const DAY_SECS: u64 = 86_400;
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
// 1970-01-01 was a Thursday.
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// Formats a point in time. Unknown directives are left unchanged.
pub(super) fn format(now: SystemTime, format: &str) -> String {
    let secs = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (day, second) = (secs / DAY_SECS, secs % DAY_SECS);
    let (year, month, day_of_month, day_of_year) = civil(day);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(day % 7) as usize]);
    let mut written = String::with_capacity(format.len() + 16);
    let mut characters = format.chars().peekable();
    while let Some(character) = characters.next() {
        if character != '%' {
            written.push(character);
            continue;
        }
        // glibc's flag for no leading zeros.
        let bare = characters.next_if_eq(&'-').is_some();
        let mut number = |value: u64, digits: usize| {
            let digits = if bare { 1 } else { digits };
            // Writing to a string cannot fail.
            let _ = write!(written, "{value:0digits$}");
        };
        match characters.next() {
            Some('Y') => number(year, 4),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day_of_month, 2),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number((hour + 11) % 12 + 1, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second % 60, 2),
            Some('B') => written.push_str(month_name),
            Some('b' | 'h') => written.push_str(&month_name[..3]),
            Some('A') => written.push_str(day_name),
            Some('a') => written.push_str(&day_name[..3]),
            Some('p') => written.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('e') if bare => number(day_of_month, 1),
            Some('e') => spaced(&mut written, day_of_month),
            Some('k') => spaced(&mut written, hour),
            Some('l') => spaced(&mut written, (hour + 11) % 12 + 1),
            Some('C') => number(year / 100, 2),
            Some('u') => number((day + 3) % 7 + 1, 1),
            Some('w') => number((day + 4) % 7, 1),
            Some('U') => number((day_of_year + 6 - (day + 4) % 7) / 7, 2),
            Some('W') => number((day_of_year + 6 - (day + 3) % 7) / 7, 2),
            Some('s') => number(secs, 1),
            Some('f') => number(0, 6),
            Some('P') => written.push_str(if hour < 12 { "am" } else { "pm" }),
            Some('n') => written.push('\n'),
            Some('t') => written.push('\t'),
            // Python's dates have no time zone unless one is given.
            Some('z' | 'Z') => {}
            Some(letter @ ('F' | 'T' | 'D' | 'R' | 'r' | 'c' | 'x' | 'X')) => {
                written.push_str(&self::format(now, composed(letter)));
            }
            Some('%') => written.push('%'),
            other => {
                written.push_str(if bare { "%-" } else { "%" });
                written.extend(other);
            }
        }
    }
    written
}

/// Returns the expansion of a directive.
fn composed(letter: char) -> &'static str {
    match letter {
        'F' => "%Y-%m-%d",
        'T' | 'X' => "%H:%M:%S",
        'D' | 'x' => "%m/%d/%y",
        'R' => "%H:%M",
        'r' => "%I:%M:%S %p",
        _ => "%a %b %e %H:%M:%S %Y",
    }
}

/// Writes a number padded with spaces to a width of two.
fn spaced(written: &mut String, value: u64) {
    // Writing to a string cannot fail.
    let _ = write!(written, "{value:2}");
}

/// Returns year, month, day of the month and day of the year for a day counted from 1970-01-01.
fn civil(mut day: u64) -> (u64, u64, u64, u64) {
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Periods of 400 years all have the same number of days. Skipping them bounds the loop.
    const PERIOD_DAYS: u64 = 146_097;
    let mut year = 1_970 + 400 * (day / PERIOD_DAYS);
    day %= PERIOD_DAYS;
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let day_of_year = day + 1;
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, day + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |secs: u64, text: &str| format(SystemTime::UNIX_EPOCH + Duration::from_secs(secs), text);
        assert_eq!(at(0, "%A %d %B %Y %H:%M:%S"), "Thursday 01 January 1970 00:00:00");
        assert_eq!(at(1_709_210_096, "%a %-d %b %y, day %j, %I:%M %p"), "Thu 29 Feb 24, day 060, 12:34 PM");
        assert_eq!(at(4_102_444_799, "%Y-%m-%d"), "2099-12-31");
        assert_eq!(at(951_782_400, "%d.%-m.%Y 100%% %q%"), "29.2.2000 100% %q%");
        assert_eq!(at(1_709_210_096, "%F %T %D %R %r"), "2024-02-29 12:34:56 02/29/24 12:34 12:34:56 PM");
        assert_eq!(at(1_709_556_996, "%e|%-e|%k|%l|%h|%u|%w|%U|%W|%C"), " 4|4|12|12|Mar|1|1|09|10|20");
        assert_eq!(
            at(1_709_556_996, "%c|%x|%X|%Z%z|%s|%P"),
            "Mon Mar  4 12:56:36 2024|03/04/24|12:56:36||1709556996|pm"
        );
        assert!(at(1 << 40, "%Y").len() > 4, "a far future is written too");
    }
}
