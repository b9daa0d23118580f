//! Waiting with a deadline. Nothing in the tests sleeps for a fixed time and hopes.

use std::{future::Future, time::Duration};

/// Asks `probe` every 50 ms until it gives something, for at most `limit`.
///
/// # Panics
/// With `what` when the time is over.
pub async fn eventually<T, F>(what: &str, limit: Duration, mut probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
