//! A value that must not be seen: no `Debug` text, no `Serialize`, wiped when dropped.

use nix::sys::{
    prctl,
    resource::{Resource, setrlimit},
};
use zeroize::Zeroize;

/// Wraps a secret. It leaves only through [`Secret::expose`], which is easy to search for.
#[derive(Clone, Default)]
pub struct Secret<T: Zeroize>(T);

/// Keeps the memory of this process out of core dumps, and from other processes of the same account. A crash leaves a message and
/// no file. Called first by every process that holds secrets.
pub fn keep_out_of_core_dumps() {
    // The limit is for files, the flag for dumps that are piped to a program, which do not ask for the limit.
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0).and_then(|()| prctl::set_dumpable(false)) {
        eprintln!("borealis: a crash may leave secrets in a core dump: {error}");
    }
}

impl<T: Zeroize> Secret<T> {
    /// Wraps `value`.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// The secret itself.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T: Zeroize> Drop for Secret<T> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<T: Zeroize> std::fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl<'de, T: Zeroize + serde::Deserialize<'de>> serde::Deserialize<'de> for Secret<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self)
    }
}
