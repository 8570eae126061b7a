//! Waiting for a condition in place of sleeping.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, sleep};

/// How long a condition may take to come true. Generous: the machines are slow and shared.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Waits until the condition gives something; fails with `what` after [`LIMIT`].
pub async fn until<T, F>(what: &str, mut condition: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        sleep(Duration::from_millis(10)).await;
    }
}
