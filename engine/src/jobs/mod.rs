//! When and where to run it: jobs, schedules, targets, occurrences, runs, results.

pub mod activity;
pub mod cursor;
pub mod delivery;
pub mod occurrence;
pub mod results;
pub mod run;
pub mod schedule;
pub mod spec;
pub mod store;
pub mod targets;
pub mod view;
pub mod zone_changes;
