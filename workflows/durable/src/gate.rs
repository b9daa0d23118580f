//! Whether a process may act: a program can have it wait, for as long as something is not as it must be.

use tokio::sync::watch;

/// Whether this process may act. Fetchers and recovery ask before each pass; a step that runs is not stopped.
#[derive(Debug, Clone)]
pub struct Gate(watch::Receiver<bool>);

/// What opens and closes a gate. A gate whose keeper is gone stays as it is.
#[derive(Debug)]
pub struct Keeper(watch::Sender<bool>);

impl Gate {
    /// One that is always open.
    #[must_use]
    pub fn open() -> Self {
        Self(watch::channel(true).1)
    }

    /// A closed gate and its keeper.
    #[must_use]
    pub fn closed() -> (Keeper, Self) {
        let (sender, receiver) = watch::channel(false);
        (Keeper(sender), Self(receiver))
    }

    /// Whether this process may act.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until this process may act.
    pub async fn opened(&self) {
        let mut gate = self.0.clone();
        if gate.wait_for(|open| *open).await.is_err() {
            // Nobody can open it any more: the process ends.
            std::future::pending::<()>().await;
        }
    }
}

impl Keeper {
    /// Opens or closes the gate.
    pub fn set(&self, open: bool) {
        self.0.send_replace(open);
    }
}
