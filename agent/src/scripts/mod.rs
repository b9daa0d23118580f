//! Scripts: taken over from the engine, kept on disk, run one at a time, reported until the engine has the result.

mod left_over;
mod output;
mod process;
mod record;
mod runner;
mod store;

pub(crate) use left_over::end_left_over;
pub(crate) use runner::{Runner, Shared, decline};
pub(crate) use store::Store;
