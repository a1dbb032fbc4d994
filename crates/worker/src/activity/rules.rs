//! The owner's rules, and what follows from them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use protocol::health::Activity;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the worker does while people use its machine. Without rules it takes jobs at all times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ActivityConfig {
    /// What the worker does while somebody uses the machine: `serve`, `deprioritise` (it takes only jobs that find room
    /// on no other worker) or `pause` (it takes none, and other workers continue its answers).
    pub in_use: Manner,
    /// Seconds without input after which nobody uses the machine.
    pub idle_secs: u64,
    /// Command that prints the seconds since the last input. If it fails, the machine counts as used. If omitted,
    /// logind and the terminals are asked (Linux only). On desktops that tell logind nothing, use for example
    /// `xprintidle` in a script.
    pub idle_command: Vec<String>,
    /// What the worker does while the machine runs on battery (Linux only).
    pub on_battery: Manner,
    /// What the worker does while the network connection is metered, as NetworkManager says (Linux only).
    pub on_metered: Manner,
    /// Quiet hours in local time, such as `["22:00-07:00"]`.
    pub quiet_hours: Vec<QuietHours>,
    /// What the worker does in quiet hours.
    pub in_quiet_hours: Manner,
    /// Seconds that running answers have when the worker pauses. After that, other workers continue them.
    pub hand_over_secs: u64,
    /// Nice value of engines, 0 to 19. With 10 or more, engines leave the processor to the programs of the people at
    /// the machine, and lose nothing while it is idle.
    pub nice: u8,
}

impl Default for ActivityConfig {
    fn default() -> Self {
        Self {
            in_use: Manner::Serve,
            idle_secs: 300,
            idle_command: Vec::new(),
            on_battery: Manner::Serve,
            on_metered: Manner::Serve,
            quiet_hours: Vec::new(),
            in_quiet_hours: Manner::Pause,
            hand_over_secs: 5,
            nice: 0,
        }
    }
}

impl ActivityConfig {
    /// Returns whether any rule can ever apply.
    pub(crate) fn has_rules(&self) -> bool {
        let is_rule = |manner| manner != Manner::Serve;
        is_rule(self.in_use)
            || is_rule(self.on_battery)
            || is_rule(self.on_metered)
            || is_rule(self.in_quiet_hours) && !self.quiet_hours.is_empty()
    }
}

/// What a worker does while a rule applies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Manner {
    /// Takes jobs as without any rule.
    #[default]
    Serve,
    /// Takes jobs that find room on no other worker.
    Deprioritise,
    /// Takes no jobs until the rule no longer applies.
    Pause,
}

impl Manner {
    fn activity(self) -> Activity {
        match self {
            Self::Serve => Activity::Accepting,
            Self::Deprioritise => Activity::Deprioritised,
            Self::Pause => Activity::Paused,
        }
    }
}

/// Hours of each day in local time, from a minute until another, which may be after midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct QuietHours {
    /// Minutes since midnight.
    from: u16,
    /// Minutes since midnight; not included.
    until: u16,
}

impl QuietHours {
    fn contains(self, minute: u16) -> bool {
        if self.from <= self.until {
            (self.from..self.until).contains(&minute)
        } else {
            minute >= self.from || minute < self.until
        }
    }
}

/// Text that does not name hours of a day.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("quiet hours are written as \"22:00-07:00\", and not {0:?}")]
pub struct NoHours(String);

impl FromStr for QuietHours {
    type Err = NoHours;

    fn from_str(text: &str) -> Result<Self, NoHours> {
        let hours = || {
            let (from, until) = text.split_once('-')?;
            let (from, until) = (minute(from.trim())?, minute(until.trim())?);
            (from != until && from < DAY).then_some(Self { from, until })
        };
        hours().ok_or_else(|| NoHours(text.to_owned()))
    }
}

/// Minutes of a day.
const DAY: u16 = 24 * 60;

/// Reads a time of day such as `07:30`, up to `24:00`, in minutes since midnight.
fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u16>().ok())?;
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    (hours <= 24 && minutes < 60).then(|| hours * 60 + minutes).filter(|minute| *minute <= DAY)
}

impl TryFrom<String> for QuietHours {
    type Error = NoHours;

    fn try_from(text: String) -> Result<Self, NoHours> {
        text.parse()
    }
}

impl From<QuietHours> for String {
    fn from(hours: QuietHours) -> Self {
        hours.to_string()
    }
}

impl fmt::Display for QuietHours {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, until } = self;
        write!(formatter, "{:02}:{:02}-{:02}:{:02}", from / 60, from % 60, until / 60, until % 60)
    }
}

/// State of a machine at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signals {
    /// Time since the last input, or `None` if nobody is logged in or nothing is known.
    pub idle: Option<Duration>,
    pub on_battery: bool,
    pub is_metered: bool,
    /// Local time in minutes since midnight.
    pub minute: u16,
}

/// Decides whether a worker takes jobs, and returns the reason for the log of its machine. Of several rules the
/// strictest applies.
pub fn decide(rules: &ActivityConfig, signals: &Signals) -> (Activity, Option<&'static str>) {
    let is_in_use = signals.idle.is_some_and(|idle| idle < Duration::from_secs(rules.idle_secs));
    let is_quiet = rules.quiet_hours.iter().any(|hours| hours.contains(signals.minute));
    let rules = [
        (is_quiet, rules.in_quiet_hours, "these are quiet hours"),
        (signals.is_metered, rules.on_metered, "the network connection is metered"),
        (signals.on_battery, rules.on_battery, "the machine runs on battery"),
        (is_in_use, rules.in_use, "somebody uses the machine"),
    ];
    let applying = rules.into_iter().filter(|(applies, manner, _)| *applies && *manner != Manner::Serve);
    let strictest = applying.max_by_key(|(_, manner, _)| *manner);
    strictest.map_or((Activity::Accepting, None), |(_, manner, reason)| (manner.activity(), Some(reason)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules() -> ActivityConfig {
        ActivityConfig {
            in_use: Manner::Pause,
            on_battery: Manner::Deprioritise,
            on_metered: Manner::Pause,
            quiet_hours: vec!["22:00-07:00".parse().expect("hours")],
            in_quiet_hours: Manner::Deprioritise,
            ..ActivityConfig::default()
        }
    }

    const IDLE: Signals =
        Signals { idle: Some(Duration::from_mins(5)), on_battery: false, is_metered: false, minute: 12 * 60 };

    #[test]
    fn each_rule_applies_while_its_condition_holds_and_the_strictest_wins() {
        for (signals, expected) in [
            (IDLE, Activity::Accepting),
            (Signals { idle: None, ..IDLE }, Activity::Accepting),
            (Signals { idle: Some(Duration::from_secs(299)), ..IDLE }, Activity::Paused),
            (Signals { on_battery: true, ..IDLE }, Activity::Deprioritised),
            (Signals { is_metered: true, ..IDLE }, Activity::Paused),
            (Signals { minute: 23 * 60, ..IDLE }, Activity::Deprioritised),
            (Signals { minute: 6 * 60 + 59, ..IDLE }, Activity::Deprioritised),
            (Signals { minute: 7 * 60, ..IDLE }, Activity::Accepting),
            (Signals { on_battery: true, is_metered: true, ..IDLE }, Activity::Paused),
        ] {
            let (activity, reason) = decide(&rules(), &signals);
            assert_eq!((activity, reason.is_some()), (expected, expected != Activity::Accepting), "{signals:?}");
        }
    }

    #[test]
    fn without_rules_nothing_keeps_a_worker_from_its_jobs() {
        let all = Signals { idle: Some(Duration::ZERO), on_battery: true, is_metered: true, minute: 0 };
        let none = ActivityConfig::default();
        assert_eq!((decide(&none, &all), none.has_rules()), ((Activity::Accepting, None), false));
        assert!(rules().has_rules());
        let quiet = ActivityConfig { quiet_hours: rules().quiet_hours, ..none };
        assert_eq!((decide(&quiet, &all).0, quiet.has_rules()), (Activity::Paused, true));
    }

    #[test]
    fn hours_are_read_as_people_write_them() {
        let hours = |text: &str| text.parse::<QuietHours>().map(|hours| hours.to_string());
        for text in ["22:00-07:00", "00:00-24:00", "9:05-17:30", "22:00 - 07:00"] {
            assert!(hours(text).is_ok(), "{text}");
        }
        assert_eq!(hours("9:05-17:30").expect("hours"), "09:05-17:30");
        for text in [
            "",
            "22-7",
            "22:00",
            "22:00-22:00",
            "24:00-01:00",
            "24:01-01:00",
            "7:60-8:00",
            "+7:00-8:00",
            "22:00-07:00-",
        ] {
            assert_eq!(hours(text), Err(NoHours(text.to_owned())));
        }
        let error = toml::from_str::<ActivityConfig>("quiet_hours = [\"night\"]").expect_err("no hours").to_string();
        assert!(error.contains("22:00-07:00"), "{error}");
    }

    proptest! {
        #[test]
        fn a_minute_is_quiet_from_the_first_until_before_the_last(from in 0..DAY, until in 0..DAY, ahead in 0..DAY) {
            prop_assume!(from != until);
            let length = (until + DAY - from) % DAY;
            let hours = QuietHours { from, until };
            prop_assert_eq!(hours.contains((from + ahead) % DAY), ahead < length);
            prop_assert_eq!(hours.to_string().parse(), Ok(hours));
        }
    }
}
