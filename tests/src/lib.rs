//! The harness of the black-box tests: a database of its own for every test, an engine on it, and typed actors, so that a
//! test reads as a sentence. What cannot be set up panics with the reason.

pub mod actor;
pub mod agent;
pub mod bench;
pub mod browser;
pub mod chaos;
pub mod crons;
pub mod database;
pub mod demo;
pub mod directory;
pub mod engine;
pub mod fleet;
pub mod house;
pub mod installation;
pub mod memory;
pub mod postgres;
pub mod probe;
pub mod processes;
pub mod proxy;
pub mod raw;
pub mod reference_agent;
pub mod robot;
pub mod sim;
pub mod totp;
pub mod wait;

pub use actor::{Actor, Device, Reply};
pub use browser::Browser;
pub use database::{TestCluster, TestDatabase};
pub use engine::TestEngine;
pub use house::House;
pub use installation::Installation;
pub use postgres::Postgres;
pub use processes::{Child, Processes};
pub use proxy::Proxy;
pub use robot::Robot;
pub use wait::eventually;
