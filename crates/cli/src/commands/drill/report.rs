//! What a drill prints: a row for each cell, and each finding with how to repeat it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::lane::{Finding, Sample};
use super::verdict::Fault;
use crate::output;

/// The result of a drill.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub(super) seed: u64,
    pub(super) kills: u32,
    pub(super) seconds: f64,
    pub(super) cells: Vec<CellReport>,
    /// What was not run, and why.
    pub(super) skipped: Vec<String>,
    /// What was found in the stores of the networks after their end, or kept a network from going on.
    pub(super) troubles: Vec<String>,
}

/// The result of a cell.
#[derive(Debug, Default, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CellReport {
    pub(super) cell: String,
    pub(super) runs: usize,
    pub(super) requests: usize,
    pub(super) whole: usize,
    pub(super) errors: BTreeMap<String, usize>,
    pub(super) lost: usize,
    pub(super) doubled: usize,
    pub(super) stuck: usize,
    pub(super) broken: usize,
    pub(super) recovery_ms: Vec<u64>,
    pub(super) pause_ms: u64,
    pub(super) findings: Vec<Finding>,
}

impl CellReport {
    pub(super) fn add(&mut self, sample: Sample) {
        self.runs += 1;
        self.requests += sample.requests;
        self.whole += sample.whole;
        for error in sample.errors {
            *self.errors.entry(error).or_default() += 1;
        }
        self.recovery_ms.push(milliseconds(sample.recovery));
        self.pause_ms = self.pause_ms.max(milliseconds(sample.pause));
        for finding in &sample.findings {
            *self.count(finding.fault) += 1;
        }
        self.findings.extend(sample.findings);
    }

    fn count(&mut self, fault: Fault) -> &mut usize {
        match fault {
            Fault::Lost => &mut self.lost,
            Fault::Doubled => &mut self.doubled,
            Fault::Stuck => &mut self.stuck,
            Fault::Broken => &mut self.broken,
        }
    }

    fn row(&self) -> Vec<String> {
        let mut recovery = self.recovery_ms.clone();
        recovery.sort_unstable();
        let seconds = |millis: Option<&u64>| millis.map(|millis| format!("{:.2}", *millis as f64 / 1e3));
        let cells = [
            self.runs,
            self.requests,
            self.whole,
            self.errors.values().sum(),
            self.lost,
            self.doubled,
            self.stuck,
            self.broken,
        ];
        let mut row = vec![self.cell.clone()];
        row.extend(cells.map(|count| count.to_string()));
        row.push(seconds(recovery.get(recovery.len() / 2)).unwrap_or_default());
        row.push(seconds(recovery.last()).unwrap_or_default());
        row.push(seconds(Some(&self.pause_ms)).unwrap_or_default());
        row
    }
}

fn milliseconds(time: Duration) -> u64 {
    time.as_millis() as u64
}

impl Report {
    pub(super) fn is_well(&self) -> bool {
        self.troubles.is_empty() && self.cells.iter().all(|cell| cell.findings.is_empty())
    }

    fn sum(&self) -> CellReport {
        let mut sum = CellReport { cell: "all".to_owned(), ..CellReport::default() };
        for cell in &self.cells {
            sum.runs += cell.runs;
            sum.requests += cell.requests;
            sum.whole += cell.whole;
            for (error, count) in &cell.errors {
                *sum.errors.entry(error.clone()).or_default() += count;
            }
            sum.lost += cell.lost;
            sum.doubled += cell.doubled;
            sum.stuck += cell.stuck;
            sum.broken += cell.broken;
            sum.recovery_ms.extend(&cell.recovery_ms);
            sum.pause_ms = sum.pause_ms.max(cell.pause_ms);
        }
        sum
    }

    pub(super) fn print(&self) {
        let head = [
            "CELL",
            "RUNS",
            "REQUESTS",
            "WHOLE",
            "ERRORS",
            "LOST",
            "DOUBLED",
            "STUCK",
            "BROKEN",
            "RECOVERY P50",
            "MAX",
            "PAUSE",
        ];
        let mut rows: Vec<Vec<String>> = self.cells.iter().map(CellReport::row).collect();
        rows.push(self.sum().row());
        output::table(&head, &rows);
        output::line(format!(
            "seconds; seed {}, {:.0} s in all. RECOVERY: from the injury or its end to the answer of a new request. \
             PAUSE: the longest between two pieces of an answer",
            self.seed, self.seconds
        ));
        let errors: Vec<String> =
            self.sum().errors.iter().map(|(error, count)| format!("{count} {}", output::one_line(error))).collect();
        if !errors.is_empty() {
            output::line(format!("errors: {}", errors.join(", ")));
        }
        for cell in &self.cells {
            for finding in &cell.findings {
                output::line(self.described(cell, finding));
            }
        }
        for trouble in &self.troubles {
            output::line(format!("\n{trouble}"));
        }
        let mut skipped: BTreeMap<&str, usize> = BTreeMap::new();
        for reason in &self.skipped {
            *skipped.entry(reason).or_default() += 1;
        }
        for (reason, count) in skipped {
            output::line(format!("skipped {}: {reason}", output::counted(count, "cell")));
        }
    }

    fn described(&self, cell: &CellReport, finding: &Finding) -> String {
        format!(
            "\n{:?} in {}, run {}: {}\n  request {} ({})\n  repeat with: tether drill --campaign {} --seed {} --kills {}",
            finding.fault,
            cell.cell,
            finding.run,
            output::one_line(&finding.text),
            finding.request_id,
            finding.request,
            cell.cell,
            self.seed,
            self.kills,
        )
    }
}
