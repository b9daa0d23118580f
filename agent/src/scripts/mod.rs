//! Scripts: taken over from the engine, kept on disk, run one at a time, reported until the engine has the result.

mod output;
mod process;
mod runner;
mod store;

pub(crate) use runner::{Runner, Shared};
pub(crate) use store::Store;
