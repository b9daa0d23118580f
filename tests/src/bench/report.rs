//! Figures, goals and references, as text and as JSON.

use std::{fmt, time::Duration};

use serde::Serialize;

/// What one bench measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The bench.
    pub bench: &'static str,
    /// The machine it ran on, in one line.
    pub machine: String,
    /// What was measured, in order.
    pub figures: Vec<Figure>,
}

/// One measured value.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// How far the repetitions of the measurement lie apart, whose median the value is; none for one that was not repeated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetitions: Option<Repetitions>,
    /// What it should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<Goal>,
    /// Whether it is; none without a goal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reached: Option<bool>,
}

/// The repetitions of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Repetitions {
    /// How many there were.
    pub count: usize,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

/// The bound a figure is held to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// This much or more.
    AtLeast(f64),
    /// This much or less.
    AtMost(f64),
}

impl Goal {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

impl Report {
    /// An empty report of `bench`.
    #[must_use]
    pub fn new(bench: &'static str, machine: &str) -> Self {
        Self { bench, machine: machine.to_owned(), figures: Vec::new() }
    }

    /// Adds a figure that has no goal: a reference, or a value that explains others.
    pub fn figure(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(name.into(), &[value], unit, None);
    }

    /// Adds the median of what the repetitions of a measurement gave; the smallest and the largest stand beside it.
    pub fn median(&mut self, goal: Option<Goal>, name: impl Into<String>, values: &[f64], unit: &'static str) {
        self.add(name.into(), values, unit, goal);
    }

    /// Adds a figure that should be `bound` or more.
    pub fn at_least(&mut self, bound: f64, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(name.into(), &[value], unit, Some(Goal::AtLeast(bound)));
    }

    /// Adds a figure that should be `bound` or less.
    pub fn at_most(&mut self, bound: f64, name: impl Into<String>, value: f64, unit: &'static str) {
        self.add(name.into(), &[value], unit, Some(Goal::AtMost(bound)));
    }

    fn add(&mut self, name: String, values: &[f64], unit: &'static str, goal: Option<Goal>) {
        let value = median(values);
        let [min, max] = [f64::min, f64::max].map(|of| values.iter().copied().fold(value, of));
        let repetitions = (values.len() > 1).then_some(Repetitions { count: values.len(), min, max });
        let figure = Figure { name, value, unit, repetitions, goal, reached: goal.map(|goal| goal.holds(value)) };
        eprintln!("  {figure}");
        self.figures.push(figure);
    }
}

/// The middle of these values, the lower one of two; 0 when there are none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    Latencies(values.to_vec()).percentile(50.0)
}

/// How many goals were reached, and which were not.
#[must_use]
pub fn summary(reports: &[Report]) -> String {
    let goals = || {
        reports.iter().flat_map(|report| report.figures.iter().filter(|f| f.goal.is_some()).map(move |figure| (report, figure)))
    };
    let missed: Vec<_> = goals().filter(|(_, figure)| figure.reached == Some(false)).collect();
    let mut text = format!("{} of {} goals reached", goals().count() - missed.len(), goals().count());
    for (report, figure) in missed {
        text.push_str(&format!("\n  {}: {figure}", report.bench));
    }
    text
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "bench {}: {}", self.bench, self.machine)?;
        self.figures.iter().try_for_each(|figure| writeln!(f, "  {figure}"))
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<64} {:>12} {}", self.name, number(self.value), self.unit)?;
        if let Some(Repetitions { count, min, max }) = self.repetitions {
            write!(f, "   (median of {count}, min {}, max {})", number(min), number(max))?;
        }
        let (sign, bound) = match self.goal {
            Some(Goal::AtLeast(bound)) => (">=", bound),
            Some(Goal::AtMost(bound)) => ("<=", bound),
            None => return Ok(()),
        };
        let verdict = if self.reached == Some(true) { "reached" } else { "MISSED" };
        write!(f, "   (goal {sign} {}: {verdict})", number(bound))
    }
}

/// As many digits as say something.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Durations, for their percentiles.
#[derive(Debug, Clone, Default)]
pub struct Latencies(Vec<f64>);

impl Latencies {
    /// Adds one.
    pub fn add(&mut self, duration: Duration) {
        self.0.push(duration.as_secs_f64() * 1_000.0);
    }

    /// Adds one, in milliseconds.
    pub fn add_ms(&mut self, ms: f64) {
        self.0.push(ms);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The duration, in milliseconds, that `percent` of all do not exceed; 0 when there are none.
    #[must_use]
    pub fn percentile(&self, percent: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
    }
}

impl FromIterator<f64> for Latencies {
    fn from_iter<I: IntoIterator<Item = f64>>(milliseconds: I) -> Self {
        Self(milliseconds.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let latencies: Latencies = (1..=200).map(f64::from).collect();
        assert_eq!([1.0, 50.0, 99.0, 100.0].map(|p| latencies.percentile(p)), [2.0, 100.0, 198.0, 200.0]);
        assert_eq!(Latencies::default().percentile(99.0), 0.0);
    }

    #[test]
    fn a_goal_is_reached_or_missed() {
        let mut report = Report::new("test", "a machine");
        report.at_least(10.0, "runs", 9.9, "runs/s");
        report.at_most(10.0, "latency", 10.0, "ms");
        report.figure("reference", 1.0, "x");
        assert_eq!(report.figures.iter().map(|figure| figure.reached).collect::<Vec<_>>(), [Some(false), Some(true), None]);
        assert!(report.to_string().contains("MISSED"));
        let summary = summary(&[report]);
        assert!(summary.starts_with("1 of 2 goals reached\n  test: runs "), "{summary}");
    }

    #[test]
    fn repetitions_show_their_median_and_how_far_they_lie_apart() {
        let mut report = Report::new("test", "a machine");
        report.median(Some(Goal::AtLeast(15.0)), "runs", &[16.0, 2.0, 17.0, 1.0, 18.0], "runs/s");
        let figure = &report.figures[0];
        assert_eq!((figure.value, figure.reached), (16.0, Some(true)));
        assert_eq!(figure.repetitions, Some(Repetitions { count: 5, min: 1.0, max: 18.0 }));
        assert!(figure.to_string().contains("median of 5, min 1.00, max 18.0"), "{figure}");
    }
}
