//! What a drill prints: a row for each cell, and each finding with how to repeat it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::runner::{Finding, Sample};
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
    /// The cells that were not run.
    pub(super) skipped: Vec<Skipped>,
    /// What was found in the stores of the networks after their end, or kept a network from going on.
    pub(super) troubles: Vec<String>,
}

/// A cell that was not run.
#[derive(Debug, Serialize)]
pub(super) struct Skipped {
    pub(super) cell: String,
    pub(super) reason: String,
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

    /// Returns whether no cell was run and nothing went wrong, so that nothing was learned.
    pub(super) fn ran_nothing(&self) -> bool {
        self.cells.is_empty() && self.troubles.is_empty()
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
        for (reason, cells) in self.skipped() {
            let count = output::counted(cells.len(), "cell");
            output::line(format!("skipped {count} ({}): {}", cells.join(", "), output::one_line(reason)));
        }
    }

    /// Returns the cells that were not run, by the reason.
    fn skipped(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut skipped: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for Skipped { cell, reason } in &self.skipped {
            skipped.entry(reason).or_default().push(cell);
        }
        skipped
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drill_that_skipped_every_cell_has_learned_nothing() {
        let skip = |cell: &str, reason: &str| Skipped { cell: cell.to_owned(), reason: reason.to_owned() };
        let mut report = Report {
            skipped: vec![
                skip("cut/gateway", "no cables"),
                skip("kill/engine", "no engine"),
                skip("cut/worker", "no cables"),
            ],
            ..Report::default()
        };
        assert!(report.ran_nothing());
        let skipped = report.skipped();
        assert_eq!(
            skipped.into_iter().collect::<Vec<_>>(),
            [("no cables", vec!["cut/gateway", "cut/worker"]), ("no engine", vec!["kill/engine"])]
        );
        report.troubles.push("no network starts".to_owned());
        assert!(!report.ran_nothing() && !report.is_well());
        let report = Report { cells: vec![CellReport::default()], ..Report::default() };
        assert!(!report.ran_nothing() && report.is_well());
    }
}
