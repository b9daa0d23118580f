//! What differs between operating systems, behind one trait.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::process::Command;

use crate::Result;

#[cfg(target_os = "linux")]
mod linux;

/// How a script of one type is started: `program` with `arguments` and the script's path after them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interpreter {
    /// Program to start.
    pub program: PathBuf,
    /// Arguments before the script's path.
    pub arguments: Vec<OsString>,
    /// Extension of the script file, without the dot.
    pub extension: &'static str,
}

/// What `install` sets up.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    /// The program the service runs.
    pub program: PathBuf,
    /// Its configuration file.
    pub config_path: PathBuf,
    /// Its state directory.
    pub state_dir: PathBuf,
}

/// Whether the service is there and runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceState {
    /// The service manager knows the service.
    pub installed: bool,
    /// What the service manager says of it, for example `active`.
    pub state: String,
}

/// An operating system the agent runs on.
pub trait Platform: Send + Sync + std::fmt::Debug + 'static {
    /// Name of the machine, empty when it has none.
    fn hostname(&self) -> String;

    /// Makes `path` and its parents; only the owner may enter `path`, which must be a directory of this account and no link.
    ///
    /// # Errors
    /// What the file system says, or whose directory it is.
    fn private_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates a file that only its owner can read, in the place of one that is there.
    ///
    /// # Errors
    /// What the file system says.
    fn private_file(&self, path: &Path) -> io::Result<File>;

    /// Opens a file for reading, or creates it for its owner alone when `create`. It must be a file of this account or of the
    /// administrator, and no link.
    ///
    /// # Errors
    /// What the file system says, or whose file it is.
    fn own_file(&self, path: &Path, create: bool) -> io::Result<File>;

    /// Makes a rename inside `dir` last through a power cut.
    ///
    /// # Errors
    /// What the file system says.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// How to start a script of `script_type`; none when this system cannot.
    fn interpreter(&self, script_type: &str) -> Option<Interpreter>;

    /// The environment every script starts from. Never the agent's own, which may hold secrets.
    fn base_environment(&self) -> Vec<(OsString, OsString)>;

    /// A program that reads its standard input to the end and does nothing with it.
    fn drain(&self) -> PathBuf;

    /// Puts the process `command` will start, and all its children, in a group of its own.
    fn own_group(&self, command: &mut Command);

    /// Asks (or with `force` makes) every process of the group led by `leader` end. A group that is gone is no error.
    ///
    /// # Errors
    /// What the system says.
    fn stop_group(&self, leader: u32, force: bool) -> io::Result<()>;

    /// Whether the group led by `leader` still has processes.
    fn group_alive(&self, leader: u32) -> bool;

    /// What tells the process with this number from every other one that ever had it; none when there is no such process.
    fn process_mark(&self, process: u32) -> Option<String>;

    /// Whether nobody but the administrator (and who called for their rights, with `sudo`) can write to `path` and the directories it is
    /// in.
    ///
    /// # Errors
    /// Who else can, or what the file system says.
    fn is_only_ours(&self, path: &Path) -> io::Result<()>;

    /// Text of the service definition, for checks and for people.
    fn service_definition(&self, spec: &ServiceSpec) -> String;

    /// Whether this process can install and remove the service here; asked before anything is changed.
    ///
    /// # Errors
    /// Missing rights or no service manager, with what to do about it.
    fn may_manage_service(&self) -> Result<()>;

    /// Installs the service and starts it.
    ///
    /// # Errors
    /// Missing rights, or what the service manager says.
    fn install_service(&self, spec: &ServiceSpec) -> Result<()>;

    /// Stops the service and removes it; the state directory stays.
    ///
    /// # Errors
    /// Missing rights, or what the service manager says.
    fn uninstall_service(&self) -> Result<()>;

    /// Asks the service manager.
    fn service_state(&self) -> ServiceState;
}

/// The operating system this program was built for.
#[must_use]
pub fn current() -> Arc<dyn Platform> {
    #[cfg(target_os = "linux")]
    {
        Arc::new(linux::Linux)
    }
    #[cfg(not(target_os = "linux"))]
    {
        compile_error!("borealis-agent has no platform module for this operating system yet")
    }
}
