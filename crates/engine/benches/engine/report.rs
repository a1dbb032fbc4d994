//! What was measured, for people as it comes and for programs at the end.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::comparison::Comparison;
use crate::continuation::Continued;
use crate::measure::{Measure, Measurement};
use crate::upstream::LlamaServer;
use crate::{Model, SLOTS, THREADS};

pub(crate) struct Report {
    /// Bytes a second that one thread and two read.
    bandwidth: [f64; 2],
    head: Value,
    models: Vec<Value>,
    rows: Vec<Value>,
}

impl Report {
    pub(crate) fn begin(rounds: usize, bandwidth: [f64; 2]) -> Self {
        let commit = commit();
        let processor = processor();
        println!(
            "{processor}; memory is read at {:.1} GB/s by one thread, {:.1} GB/s by two",
            bandwidth[0] / 1e9,
            bandwidth[1] / 1e9
        );
        println!("our commit {commit}; medians of {rounds} rounds, both sides in turn\n");
        let head = json!({
            "at_unix_seconds": SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs(),
            "commit": commit, "processor": processor, "rounds": rounds, "threads": THREADS, "slots": SLOTS,
            "read_bytes_per_second_by_threads": bandwidth,
        });
        Self { bandwidth, head, models: Vec::new(), rows: Vec::new() }
    }

    pub(crate) fn model(&mut self, model: &Model, ours: &str, theirs: &str) {
        let flags = LlamaServer::flags(model).join(" ");
        let [one, two] = self.bandwidth.map(|bandwidth| bandwidth / model.roofline.bytes_per_token as f64);
        println!("{}: {SLOTS} slots of {} tokens, {THREADS} threads", model.name, model.context);
        println!("  ours      {ours}");
        println!("  upstream  {theirs}: llama-server {flags}; llama-bench -t {THREADS} -r 1");
        println!(
            "  roofline  {:.0} MB a token: {one:.1} tokens/s by one thread, {two:.1} by two",
            model.roofline.bytes_per_token as f64 / 1e6
        );
        self.models.push(json!({
            "model": model.name, "context": model.context, "ours": ours, "upstream": theirs, "server_flags": flags,
            "bytes_per_token": model.roofline.bytes_per_token, "roofline_tokens_per_second_by_threads": [one, two],
        }));
    }

    /// `accepted` is the share of suggested tokens that were right, where tokens were suggested.
    pub(crate) fn row(
        &mut self,
        model: &Model,
        comparison: &Comparison,
        measured: &[(Measurement, Measurement)],
        accepted: Option<f64>,
    ) {
        let Comparison { name, measure, against, target } = *comparison;
        let (ours, theirs): (Vec<f64>, Vec<f64>) =
            measured.iter().map(|(ours, theirs)| (ours.figure, theirs.figure)).unzip();
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
        let medians = [median(&ours), median(&theirs)];
        let ratio = medians[0] / medians[1];
        let (unit, of_rounds, reached) = (measure.unit(), median(&ratios), target.is_reached(ratio));
        let newcomers = newcomers(measured);
        let aside = match accepted {
            Some(share) => format!("{:.0} % of the suggestions were right", 100.0 * share),
            None => self.aside(model, measure, medians, newcomers),
        };
        println!(
            "  {name:<14} {:>8.1} {:>8.1} {unit:<8} of {against:<12}  ratio {ratio:.3} (of rounds {of_rounds:.3})  \
             {target} {:<7}  load {}  {aside}",
            medians[0],
            medians[1],
            if reached { "reached" } else { "MISSED" },
            load(),
        );
        self.rows.push(json!({
            "model": model.name, "measure": name, "unit": unit, "baseline": against.to_string(),
            "ours": ours, "theirs": theirs, "ratio_of_medians": ratio, "median_of_ratios": of_rounds,
            "target": target.to_string(), "reached": reached, "load": load(),
            "newcomer_waits_ms": newcomers, "accepted_share": accepted,
        }));
    }

    /// `measured` is of answers that went on alone, and beside others.
    pub(crate) fn continued(&mut self, model: &Model, temperature: f32, measured: [Continued; 2]) {
        let lines = measured.map(|Continued { answers, equal, same_share }| {
            format!("{equal} of {answers} to the end, {:.1} % of their tokens up to a difference", 100.0 * same_share)
        });
        println!("  continuation   temperature {temperature}: alone {}; beside others {}", lines[0], lines[1]);
        for (others, it) in ["none", "seven"].into_iter().zip(measured) {
            self.rows.push(json!({
                "model": model.name, "measure": "continuation", "temperature": temperature, "others": others,
                "answers": it.answers, "equal": it.equal, "same_share": it.same_share,
            }));
        }
    }

    /// Writes everything so far as JSON.
    pub(crate) fn save(&self, path: &Path) {
        let all = json!({ "run": self.head, "models": self.models, "rows": self.rows });
        fs::write(path, serde_json::to_string_pretty(&all).unwrap()).unwrap();
        println!("  as JSON in {}\n", path.display());
    }

    /// Returns what else there is to say of a measure, about ours and theirs.
    fn aside(&self, model: &Model, measure: Measure, medians: [f64; 2], newcomers: Option<[f64; 2]>) -> String {
        let of = |whole: f64| medians.map(|figure| figure / whole);
        match (measure, newcomers) {
            (Measure::Generate(1), _) => {
                let [ours, theirs] = of(self.bandwidth[1] / model.roofline.bytes_per_token as f64 / 100.0);
                format!("{ours:.0} and {theirs:.0} % of the roofline")
            }
            (Measure::Prompt, _) => {
                let [ours, theirs] = of(1e9 / model.roofline.operations_per_prompt_token as f64);
                format!("{ours:.0} and {theirs:.0} GOP/s")
            }
            (_, Some([ours, theirs])) => format!("the new prompt waits {ours:.0} and {theirs:.0} ms"),
            _ => String::new(),
        }
    }
}

fn newcomers(measured: &[(Measurement, Measurement)]) -> Option<[f64; 2]> {
    let ours = measured.iter().map(|it| it.0.newcomer).collect::<Option<Vec<_>>>()?;
    let theirs = measured.iter().map(|it| it.1.newcomer).collect::<Option<Vec<_>>>()?;
    Some([median(&ours), median(&theirs)])
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Processes that ran or wanted to, as a mean over the last minute; the measured ones are among them.
fn load() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or_default().to_owned()
}

fn processor() -> String {
    let about = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = about.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} cores of {}", name.map_or("an unknown processor", |(_, name)| name))
}

fn commit() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    output.map_or_else(|_| "unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
