//! The comparisons that were promised, and their rounds.

use std::fmt;

use crate::Model;
use crate::measure::{Measure, Measurement, Workload};
use crate::ours::Ours;
use crate::report::Report;
use crate::side::Side;
use crate::upstream::{LlamaBench, LlamaServer, Programs};

/// Tokens that speculation suggests at once.
const DRAFT_TOKENS: u32 = 3;

/// One line of the table: a measure of ours as a ratio to that of a baseline.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Comparison {
    pub(crate) name: &'static str,
    pub(crate) measure: Measure,
    pub(crate) against: Against,
    pub(crate) target: Target,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Against {
    LlamaServer,
    LlamaBench,
    /// Our engine without speculation.
    Unspeculated,
}

/// What the ratio must be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl fmt::Display for Against {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::LlamaServer => "llama-server",
            Self::LlamaBench => "llama-bench",
            Self::Unspeculated => "without",
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(least) => write!(formatter, "≥ {least:.2}"),
            Self::AtMost(most) => write!(formatter, "≤ {most:.2}"),
        }
    }
}

impl Target {
    pub(crate) fn is_reached(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(least) => ratio >= least,
            Self::AtMost(most) => ratio <= most,
        }
    }
}

const fn promise(name: &'static str, measure: Measure, against: Against, target: Target) -> Comparison {
    Comparison { name, measure, against, target }
}

use Against::{LlamaBench as Bench, LlamaServer as Server, Unspeculated};
use Target::{AtLeast, AtMost};

pub(crate) const COMPARISONS: [Comparison; 12] = [
    promise("prompt", Measure::Prompt, Bench, AtLeast(0.97)),
    promise("prompt", Measure::Prompt, Server, AtLeast(0.97)),
    promise("generate-1", Measure::Generate(1), Bench, AtLeast(0.97)),
    promise("generate-1", Measure::Generate(1), Server, AtLeast(0.97)),
    promise("generate-4", Measure::Generate(4), Server, AtLeast(1.05)),
    promise("generate-8", Measure::Generate(8), Server, AtLeast(1.05)),
    promise("second-adapter", Measure::SecondAdapter, Server, AtMost(0.2)),
    promise("second-turn", Measure::SecondTurn, Server, AtMost(1.0)),
    promise("admission-gap", Measure::Gap, Server, AtMost(0.5)),
    promise("speculation-0", Measure::Predicted(0), Unspeculated, AtLeast(0.97)),
    promise("speculation-50", Measure::Predicted(50), Unspeculated, AtLeast(1.1)),
    promise("speculation-80", Measure::Predicted(80), Unspeculated, AtLeast(1.3)),
];

/// The rounds of one model.
pub(crate) struct Rounds<'a> {
    pub(crate) model: &'a Model,
    pub(crate) programs: &'a Programs,
    pub(crate) rounds: usize,
    begun: u64,
}

#[derive(Clone, Copy)]
enum Contender<'a> {
    Side(&'a dyn Side),
    Bench(&'a LlamaBench<'a>),
}

impl Contender<'_> {
    async fn take(self, measure: Measure, workload: &Workload) -> Measurement {
        match self {
            Self::Side(side) => measure.take(side, workload).await,
            Self::Bench(bench) => bench.take(measure).await.into(),
        }
    }
}

impl<'a> Rounds<'a> {
    pub(crate) fn new(model: &'a Model, programs: &'a Programs, rounds: usize) -> Self {
        Self { model, programs, rounds, begun: 0 }
    }

    pub(crate) async fn run(mut self, comparisons: &[Comparison], report: &mut Report) {
        let (model, programs) = (self.model, self.programs);
        let ours = Ours::load(model, 0).await;
        let server = LlamaServer::start(programs, model, false).await;
        let bench = LlamaBench { programs, model };
        report.model(model, &ours.describe(), &bench.build().await);

        for side in [&ours as &dyn Side, &server] {
            Measure::Generate(1).take(side, &self.workload()).await;
        }
        for comparison in comparisons {
            let mut accepted = None;
            let measured = match comparison.against {
                Server if comparison.measure == Measure::SecondAdapter => {
                    // With adapters at hand a llama-server is slower at everything, so it has them here alone.
                    let mut ours = Ours::load(model, 0).await;
                    ours.add_adapters(model).await;
                    let server = LlamaServer::start(programs, model, true).await;
                    let both = (Contender::Side(&ours), Contender::Side(&server));
                    let measured = self.take(comparison.measure, both.0, both.1).await;
                    server.stop().await;
                    ours.stop().await;
                    measured
                }
                Server => self.take(comparison.measure, Contender::Side(&ours), Contender::Side(&server)).await,
                Bench => self.take(comparison.measure, Contender::Side(&ours), Contender::Bench(&bench)).await,
                Unspeculated => {
                    let speculating = Ours::load(model, DRAFT_TOKENS).await;
                    let both = (Contender::Side(&speculating), Contender::Side(&ours));
                    let measured = self.take(comparison.measure, both.0, both.1).await;
                    accepted = Some(speculating.accepted_share());
                    speculating.stop().await;
                    measured
                }
            };
            report.row(model, comparison, &measured, accepted);
        }
        server.stop().await;
        ours.stop().await;
    }

    /// Takes turns, and who begins takes turns as well.
    async fn take(
        &mut self,
        measure: Measure,
        ours: Contender<'_>,
        theirs: Contender<'_>,
    ) -> Vec<(Measurement, Measurement)> {
        let mut measured = Vec::new();
        for round in 0..self.rounds {
            let workload = self.workload();
            measured.push(if round % 2 == 0 {
                let first = ours.take(measure, &workload).await;
                (first, theirs.take(measure, &workload).await)
            } else {
                let first = theirs.take(measure, &workload).await;
                (ours.take(measure, &workload).await, first)
            });
        }
        measured
    }

    fn workload(&mut self) -> Workload {
        self.begun += 1;
        Workload { round: self.begun, vocabulary: self.model.vocabulary, context: self.model.context }
    }
}
