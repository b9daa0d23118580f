//! What the runtime tells of steps and runs, as spans.

use borealis_durable::observer::{Observer, StepObserver};
use borealis_telemetry::trace::{self, Span};
use futures::future::BoxFuture;
use uuid::Uuid;

/// Writes a span for each attempt of a step and one for each run, when spans are exported.
#[derive(Debug, Clone, Copy)]
pub struct Traces;

impl Observer for Traces {
    fn step(&self, run: Uuid, workflow: &'static str, step: &'static str, attempt: i32) -> Option<Box<dyn StepObserver>> {
        trace::is_on().then(|| Box::new(Traced(Span::step(run, workflow, step, attempt))) as Box<dyn StepObserver>)
    }

    fn run_ended(&self, run: Uuid, workflow: &str, state: &'static str) {
        if trace::is_on() {
            trace::run_ended(run, workflow.to_owned(), state);
        }
    }
}

struct Traced(Span);

impl StepObserver for Traced {
    fn around<'a>(&'a self, step: BoxFuture<'a, ()>) -> BoxFuture<'a, ()> {
        Box::pin(self.0.around(step))
    }

    fn committed(self: Box<Self>, outcome: &'static str, went_wrong: bool) {
        self.0.committed(outcome, went_wrong);
    }
}
