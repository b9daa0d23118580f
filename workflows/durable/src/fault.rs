//! Fail points of the crash matrix: places where a test makes this very process die as if its power were cut.
//!
//! A point is named `<place>:<workflow>:<step>`, where place is `before`, `inside`, `after_effect` or `after_commit`.
//! Without the feature `failpoints` they compile to nothing.

/// Dies here when a test asked for it. A step may have points of its own, named `inside`.
pub fn point(place: &str, workflow: &str, step: &str) {
    #[cfg(feature = "failpoints")]
    {
        let name = format!("{place}:{workflow}:{step}");
        if fail::eval(&name, |_| ()).is_some() {
            die();
        }
    }
    #[cfg(not(feature = "failpoints"))]
    let _ = (place, workflow, step);
}

/// SIGKILL to ourselves: no destructor, no handler, no farewell.
#[cfg(feature = "failpoints")]
fn die() -> ! {
    let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    std::process::abort()
}

/// Reads the points to die at from the environment variable `FAILPOINTS`; they stay until the value is dropped.
#[cfg(feature = "failpoints")]
#[must_use]
pub fn from_environment() -> fail::FailScenario<'static> {
    fail::FailScenario::setup()
}
