//! Clocks of single processes that can be turned while they run, with libfaketime where it is installed. Only the clock of
//! the day is turned: the monotonic one does not jump on a real machine either.

use std::path::{Path, PathBuf};

use crate::Processes;

/// Where Debian's package libfaketime puts the library; the folder between differs by architecture.
const FOLDERS: [&str; 2] = ["/usr/lib", "/usr/lib64"];
const LIBRARY: &str = "faketime/libfaketime.so.1";

/// A clock for each process.
#[derive(Debug)]
pub struct Clocks {
    library: PathBuf,
    folder: tempfile::TempDir,
}

impl Clocks {
    /// This many clocks that show the right time; none without the library.
    pub fn new(count: usize) -> Option<Self> {
        let clocks = Self { library: library()?, folder: tempfile::tempdir().expect("a folder") };
        (0..count).for_each(|index| clocks.turn(index, 0));
        Some(clocks)
    }

    fn file(&self, index: usize) -> PathBuf {
        self.folder.path().join(index.to_string())
    }

    /// Has the clock show the right time and so many seconds more.
    pub fn turn(&self, index: usize, seconds: i32) {
        let (file, new) = (self.file(index), self.folder.path().join(format!("{index}.new")));
        // Replaced as a whole, so that nobody reads half of it.
        std::fs::write(&new, format!("{seconds:+}\n")).and_then(|()| std::fs::rename(&new, &file)).expect("a clock's file");
    }

    /// Gives this clock to the processes that are started next.
    pub fn wear(&self, index: usize, processes: &mut Processes) {
        processes
            .set("LD_PRELOAD", self.library.display().to_string())
            .set("FAKETIME_TIMESTAMP_FILE", self.file(index).display().to_string())
            // Seconds after which the file is read again.
            .set("FAKETIME_CACHE_DURATION", "1")
            .set("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }
}

/// The library, when it is installed.
fn library() -> Option<PathBuf> {
    let below = |folder: &Path| {
        let folders = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        folders.chain([folder.to_owned()]).map(|folder| folder.join(LIBRARY)).find(|path| path.exists())
    };
    FOLDERS.iter().find_map(|folder| below(Path::new(folder)))
}
