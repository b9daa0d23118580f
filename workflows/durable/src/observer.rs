//! For programs that write traces: what is told of steps and runs as they happen. Metrics need none of it.

use std::sync::OnceLock;

use futures::future::BoxFuture;
use uuid::Uuid;

static OBSERVER: OnceLock<Box<dyn Observer>> = OnceLock::new();

/// What a program wants to be told.
pub trait Observer: Send + Sync {
    /// An attempt of a step begins. None: nothing more is wanted of it.
    fn step(&self, run: Uuid, workflow: &'static str, step: &'static str, attempt: i32) -> Option<Box<dyn StepObserver>>;

    /// A run has ended in this process, in this state.
    fn run_ended(&self, run: Uuid, workflow: &str, state: &'static str);
}

/// What a program wants to be told of one attempt of a step. It is dropped without a word when the process takes the run for lost.
pub trait StepObserver: Send + Sync {
    /// Runs the step: awaits it to its end.
    fn around<'a>(&'a self, step: BoxFuture<'a, ()>) -> BoxFuture<'a, ()>;

    /// What became of it: a word, and whether something went wrong.
    fn committed(self: Box<Self>, outcome: &'static str, went_wrong: bool);
}

/// Has `observer` be told of all steps of this process. There is one in a process: the first that is set.
pub fn observe(observer: impl Observer + 'static) {
    let _ = OBSERVER.set(Box::new(observer));
}

pub(crate) fn run_ended(run: Uuid, workflow: &str, state: &'static str) {
    if let Some(observer) = OBSERVER.get() {
        observer.run_ended(run, workflow, state);
    }
}

pub(crate) fn step(run: Uuid, workflow: &'static str, step: &'static str, attempt: i32) -> Observed {
    Observed(OBSERVER.get().and_then(|observer| observer.step(run, workflow, step, attempt)))
}

/// An attempt, watched by an observer where there is one.
pub(crate) struct Observed(Option<Box<dyn StepObserver>>);

impl Observed {
    /// Runs a step. None when the observer did not.
    pub async fn around<T: Send>(&self, step: impl Future<Output = T> + Send) -> Option<T> {
        let Some(observer) = &self.0 else { return Some(step.await) };
        let (done, mut answer) = tokio::sync::oneshot::channel();
        let step = async {
            // The other end is below.
            let _ = done.send(step.await);
        };
        observer.around(Box::pin(step)).await;
        answer.try_recv().ok()
    }

    pub fn committed(self, outcome: &'static str, went_wrong: bool) {
        if let Some(observer) = self.0 {
            observer.committed(outcome, went_wrong);
        }
    }
}
