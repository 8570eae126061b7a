//! Asks again where that may help: a [`Model`] around another. Knows no provider.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use rand::Rng as _;

use super::{Error, Model, Pieces, Prompt, Result};

/// How often to ask, and how long to wait in between.
#[derive(Debug, Clone)]
pub struct Policy {
    /// How often a prompt is asked at most, the first time included.
    pub attempts_max: u32,
    /// The longest wait before the second attempt. It doubles with each attempt that follows.
    pub base: Duration,
    /// The longest wait before any attempt.
    pub wait_max: Duration,
    /// The longest wait that a provider may ask for. If it asks for more, the failure is the
    /// answer: a client that is told when to come back is better off than one that hangs.
    pub retry_after_max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            attempts_max: 4,
            base: Duration::from_millis(500),
            wait_max: Duration::from_secs(20),
            retry_after_max: Duration::from_secs(30),
        }
    }
}

impl Policy {
    /// How long to wait after this many attempts failed, the last one with this error; `None` to
    /// give up. `random` is from 0 to 1: it spreads the clients that failed at the same moment.
    fn wait(&self, attempts: u32, error: &Error, random: f64) -> Option<Duration> {
        let asked_for = error.retry()?;
        if attempts >= self.attempts_max {
            return None;
        }
        if let Some(asked_for) = asked_for {
            let spread = self.base.mul_f64(random);
            return (asked_for <= self.retry_after_max).then(|| asked_for + spread);
        }
        let doublings = attempts.saturating_sub(1).min(30);
        let longest = self.base.saturating_mul(1 << doublings).min(self.wait_max);
        // At least half of it: a wait of nearly nothing would waste an attempt.
        Some(longest.mul_f64(0.5 + random / 2.0))
    }
}

/// A model whose failures before the first piece are tried again. After the first piece nothing
/// is: the pieces have been passed on, and another answer would not continue them.
///
/// It keeps no deadline. Whoever asks drops the future when time is up.
pub struct Retry {
    model: Arc<dyn Model>,
    policy: Policy,
}

impl Retry {
    pub fn new(model: Arc<dyn Model>, policy: Policy) -> Self {
        Self { model, policy }
    }

    /// Asks once, and waits for the first piece.
    async fn attempt(&self, prompt: Prompt) -> Result<Pieces> {
        let mut pieces = self.model.answer(prompt).await?;
        match pieces.next().await {
            Some(first) => Ok(stream::iter([Ok(first?)]).chain(pieces).boxed()),
            None => Err(Error::Broken("it had neither pieces nor an end".to_owned())),
        }
    }
}

#[async_trait]
impl Model for Retry {
    async fn answer(&self, prompt: Prompt) -> Result<Pieces> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let error = match self.attempt(prompt.clone()).await {
                Ok(pieces) => return Ok(pieces),
                Err(error) => error,
            };
            let random = rand::rng().random();
            let Some(wait) = self.policy.wait(attempts, &error, random) else {
                return Err(error);
            };
            // What the provider says of the failure may repeat the conversation: not logged.
            let failure = match error {
                Error::RateLimited { .. } => "rate limited",
                Error::Unavailable { .. } => "unavailable",
                Error::Broken(_) => "broken",
                Error::UnknownModel(_) | Error::Unauthorized(_) | Error::Rejected(_) => "final",
            };
            let wait_ms = wait.as_millis() as u64;
            tracing::info!(attempts, failure, wait_ms, "asking the model again");
            tokio::time::sleep(wait).await;
        }
    }

    fn default_model(&self) -> &str {
        self.model.default_model()
    }

    fn describe(&self) -> String {
        self.model.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable(retry_after: Option<Duration>) -> Error {
        Error::Unavailable {
            reason: "x".to_owned(),
            retry_after,
        }
    }

    #[test]
    fn waits_double_up_to_a_limit_and_are_spread() {
        let policy = Policy {
            attempts_max: 100,
            ..Policy::default()
        };
        let ms = |attempts, random| {
            let wait = policy.wait(attempts, &unavailable(None), random);
            wait.expect("a wait").as_millis()
        };
        assert_eq!((ms(1, 0.0), ms(1, 1.0)), (250, 500));
        assert_eq!((ms(2, 0.0), ms(2, 1.0)), (500, 1_000));
        assert_eq!((ms(3, 0.0), ms(3, 1.0)), (1_000, 2_000));
        assert_eq!((ms(7, 0.0), ms(7, 1.0)), (10_000, 20_000));
        assert_eq!(ms(99, 1.0), 20_000);
    }

    #[test]
    fn a_provider_that_says_when_is_waited_for_unless_it_is_too_long() {
        let policy = Policy::default();
        let wait = |seconds, random| {
            let error = unavailable(Some(Duration::from_secs(seconds)));
            policy.wait(1, &error, random)
        };
        assert_eq!(wait(7, 0.0), Some(Duration::from_secs(7)));
        assert_eq!(wait(7, 1.0), Some(Duration::from_millis(7_500)));
        assert_eq!(wait(30, 0.0), Some(Duration::from_secs(30)));
        assert_eq!(wait(31, 0.0), None);
    }

    #[test]
    fn what_cannot_succeed_is_not_tried_again() {
        let policy = Policy::default();
        for error in [
            Error::UnknownModel("m".to_owned()),
            Error::Unauthorized("x".to_owned()),
            Error::Rejected("x".to_owned()),
        ] {
            assert_eq!(policy.wait(1, &error, 0.5), None, "{error}");
        }
        let broken = Error::Broken("x".to_owned());
        assert!(policy.wait(3, &broken, 0.5).is_some());
        assert_eq!(policy.wait(4, &broken, 0.5), None);
    }
}
