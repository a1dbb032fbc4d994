//! What is injured, when and how: the cells of a drill.

use std::fmt;
use std::time::Duration;

use super::network::Setting;
use super::points::{POINTS, Point};

/// Whose process is injured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Gateway,
    Orchestrator,
    Worker,
    Engine,
    Registry,
}

const VICTIMS: [Victim; 5] = [Victim::Gateway, Victim::Orchestrator, Victim::Worker, Victim::Engine, Victim::Registry];

impl Victim {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Orchestrator => "orchestrator",
            Self::Worker => "worker",
            Self::Engine => "engine",
            Self::Registry => "registry",
        }
    }
}

/// A step of a request, as it is seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Idle,
    Connected,
    HeadSent,
    HalfSent,
    BodySent,
    Reserved,
    Dispatched,
    FirstByte,
    FirstToken,
    MidAnswer,
    MidSchema,
    MidToolCall,
    MidReasoning,
    MidChoices,
    WholeUnderWay,
    LastToken,
    LastChunk,
    Done,
    Attached,
    Replayed,
}

const STEPS: [(Step, &str, &str); 20] = [
    (Step::Idle, "idle", "nothing runs; the request follows at once"),
    (Step::Connected, "connected", "the client is connected and has sent nothing"),
    (Step::HeadSent, "head-sent", "the head of the request is sent"),
    (Step::HalfSent, "half-sent", "half of the body is sent"),
    (Step::BodySent, "body-sent", "the whole request is sent"),
    (Step::Reserved, "reserved", "the job is listed, its engine has not begun"),
    (Step::Dispatched, "dispatched", "the job is at its worker, its engine has not begun"),
    (Step::FirstByte, "first-byte", "the head of the response has arrived"),
    (Step::FirstToken, "first-token", "the first piece of the answer has arrived"),
    (Step::MidAnswer, "mid-answer", "in the middle of a streamed text"),
    (Step::MidSchema, "mid-schema", "in the middle of an answer that follows a JSON schema"),
    (Step::MidToolCall, "mid-tool-call", "in the middle of a function call"),
    (Step::MidReasoning, "mid-reasoning", "in the middle of the reasoning before an answer"),
    (Step::MidChoices, "mid-choices", "in the middle of two answers to one request"),
    (Step::WholeUnderWay, "whole", "in the middle of an answer in one piece"),
    (Step::LastToken, "last-token", "the whole text has arrived, the job is about to be settled"),
    (Step::LastChunk, "last-chunk", "the finish reason has arrived"),
    (Step::Done, "done", "the response is complete"),
    (Step::Attached, "attached", "a repeat of the running request reads along"),
    (Step::Replayed, "replayed", "a repeat of the finished request is being answered"),
];

/// What happens to a victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Injury {
    /// SIGKILL at a step of a request.
    Kill(Step),
    /// SIGKILL by the victim itself, at an exact point of its program.
    Point(Point),
    /// SIGSTOP, and SIGCONT after a while.
    Freeze(Duration),
    /// Its network is cut for a while.
    Cut(Duration),
    /// Its disk is full for a while.
    FullDisk(Duration),
    /// Its clock is wrong by so many seconds for a while.
    Skew(i64),
    /// SIGKILL, and a start after a while.
    Absence(Duration),
    /// SIGKILL under a crowd of requests, whose answers have begun or wait for a slot.
    Crowd,
    /// SIGKILL while many clients read the answer to one request with a key.
    Repeats,
    /// SIGTERM, and a start.
    Stop,
    /// SIGKILL of every process at once.
    PowerCut,
}

/// One cell: an injury of a victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) victim: Victim,
    pub(super) injury: Injury,
}

/// What may happen to a request without a key.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tolerance {
    /// Its client may get an error.
    pub(super) errors: bool,
    /// Its response may break off without an error.
    pub(super) cuts: bool,
}

/// How long a wrong clock stays wrong.
pub(super) const SKEWED_FOR: Duration = Duration::from_secs(20);
/// Requests of a crowd: more than a worker has slots.
pub(super) const CROWD: usize = 12;
/// Clients that send one request. A gateway takes 64 connections from an address.
pub(super) const REPEATS: usize = 50;
const SECOND: Duration = Duration::from_secs(1);

impl Cell {
    /// Returns every cell, in the order in which drills run them.
    pub(super) fn all() -> Vec<Self> {
        let cell = |victim, injury| Self { victim, injury };
        let kills = VICTIMS
            .into_iter()
            .flat_map(|victim| STEPS.into_iter().map(move |(step, ..)| Self { victim, injury: Injury::Kill(step) }));
        let freezes = VICTIMS
            .into_iter()
            .flat_map(|victim| [5, 20].map(|seconds| Self { victim, injury: Injury::Freeze(seconds * SECOND) }));
        let disks = [Victim::Orchestrator, Victim::Gateway, Victim::Registry, Victim::Worker]
            .map(|victim| cell(victim, Injury::FullDisk(3 * SECOND)));
        let clocks = [Victim::Worker, Victim::Gateway, Victim::Orchestrator, Victim::Registry]
            .into_iter()
            .flat_map(|victim| [90, -90].map(|seconds| Self { victim, injury: Injury::Skew(seconds) }));
        let cuts = [Victim::Worker, Victim::Gateway]
            .into_iter()
            .flat_map(|victim| [1, 5, 20].map(|seconds| Self { victim, injury: Injury::Cut(seconds * SECOND) }));
        let stops = [Victim::Gateway, Victim::Orchestrator, Victim::Worker, Victim::Registry]
            .map(|victim| cell(victim, Injury::Stop));
        let crowds = [Victim::Worker, Victim::Engine].map(|victim| cell(victim, Injury::Crowd));
        let repeats =
            [Victim::Gateway, Victim::Orchestrator, Victim::Worker].map(|victim| cell(victim, Injury::Repeats));
        let points = POINTS.iter().map(|point| cell(point.victim, Injury::Point(*point)));
        kills
            .chain(points)
            .chain(crowds)
            .chain(repeats)
            .chain(freezes)
            .chain([cell(Victim::Registry, Injury::Absence(30 * SECOND))])
            .chain(stops)
            .chain([cell(Victim::Orchestrator, Injury::PowerCut)])
            .chain(disks)
            .chain(clocks)
            .chain(cuts)
            .collect()
    }

    /// Returns the network that the cell needs.
    pub(super) fn setting(self) -> Setting {
        match self.injury {
            Injury::FullDisk(_) => Setting::SmallDisks,
            Injury::Skew(_) => Setting::Clocks,
            Injury::Cut(_) => Setting::Cables,
            Injury::Point(_) => Setting::Points,
            _ => Setting::Plain,
        }
    }

    /// Returns how often the cell is run for a number of kills.
    pub(super) fn runs(self, kills: u32) -> u32 {
        match self.injury {
            Injury::Kill(_) | Injury::Point(_) => kills,
            _ => kills.div_ceil(10),
        }
    }

    /// Returns what may happen to a request without a key. Only the gateway and the orchestrator have it alone, so what
    /// happens to a worker, an engine or the registry is no excuse for an error.
    pub(super) fn tolerance(self) -> Tolerance {
        let is_killed = matches!(self.injury, Injury::Kill(_) | Injury::Point(_) | Injury::Repeats | Injury::PowerCut);
        match (self.victim, self.injury) {
            (_, Injury::PowerCut) => Tolerance { errors: true, cuts: true },
            (Victim::Gateway, injury) => {
                let only_logs = matches!(injury, Injury::FullDisk(_));
                Tolerance { errors: !only_logs, cuts: is_killed }
            }
            (Victim::Orchestrator, _) => Tolerance { errors: true, cuts: false },
            (Victim::Worker | Victim::Engine | Victim::Registry, _) => Tolerance::default(),
        }
    }

    /// Describes the cell for a list.
    pub(super) fn described(self) -> String {
        match self.injury {
            Injury::Kill(step) => STEPS.iter().find(|known| known.0 == step).map_or("", |known| known.2).to_owned(),
            Injury::Point(point) => point.what.to_owned(),
            Injury::Freeze(time) => format!("stands still for {} s (SIGSTOP, SIGCONT)", time.as_secs()),
            Injury::Cut(time) => format!("reaches nobody for {} s", time.as_secs()),
            Injury::FullDisk(time) => format!("its disk, with store and log, is full for {} s", time.as_secs()),
            Injury::Skew(seconds) => format!("its clock is {seconds:+} s off for {} s", SKEWED_FOR.as_secs()),
            Injury::Absence(time) => format!("is killed and started after {} s", time.as_secs()),
            Injury::Crowd => format!("is killed under {CROWD} requests at once"),
            Injury::Repeats => format!("is killed while {REPEATS} clients read one answer"),
            Injury::Stop => "is asked to stop (SIGTERM) and started again".to_owned(),
            Injury::PowerCut => "every process is killed at once and started again".to_owned(),
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let victim = self.victim.name();
        match self.injury {
            Injury::Kill(step) => {
                let name = STEPS.iter().find(|known| known.0 == step).map_or("", |known| known.1);
                write!(formatter, "kill/{victim}/{name}")
            }
            Injury::Point(point) => write!(formatter, "point/{}", point.name),
            Injury::Freeze(time) => write!(formatter, "freeze/{victim}/{}s", time.as_secs()),
            Injury::Cut(time) => write!(formatter, "cut/{victim}/{}s", time.as_secs()),
            Injury::FullDisk(_) => write!(formatter, "disk-full/{victim}"),
            Injury::Skew(seconds) => write!(formatter, "clock/{victim}/{seconds:+}s"),
            Injury::Absence(time) => write!(formatter, "away/{victim}/{}s", time.as_secs()),
            Injury::Crowd => write!(formatter, "crowd/{victim}"),
            Injury::Repeats => write!(formatter, "repeats/{victim}"),
            Injury::Stop => write!(formatter, "stop/{victim}"),
            Injury::PowerCut => formatter.write_str("power-cut"),
        }
    }
}

/// Returns the cells whose names begin with one of the given ones, or all.
pub(super) fn chosen(names: &[String]) -> Vec<Cell> {
    let is_chosen = |cell: &Cell| {
        let cell = cell.to_string();
        let begins = |name: &String| {
            let rest = cell.strip_prefix(name.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        names.is_empty() || names.iter().any(begins)
    };
    Cell::all().into_iter().filter(is_chosen).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_cell_has_a_name_of_its_own_by_which_it_is_chosen() {
        let all = Cell::all();
        let names: HashSet<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), all.len());
        for cell in &all {
            assert_eq!(chosen(&[cell.to_string()]), [*cell]);
        }
        assert_eq!(chosen(&[]).len(), all.len());
        assert_eq!(chosen(&["kill/worker".to_owned(), "power-cut".to_owned()]).len(), STEPS.len() + 1);
        assert!(chosen(&["kill/work".to_owned()]).is_empty());
    }

    #[test]
    fn fourteen_steps_and_more_are_killed_at_for_each_of_five_victims() {
        for victim in VICTIMS {
            let kills =
                Cell::all().into_iter().filter(|cell| cell.victim == victim && matches!(cell.injury, Injury::Kill(_)));
            assert!(kills.count() >= 14, "{}", victim.name());
        }
    }
}
