//! One attempt at a turn, by the server that has its lease: asks the model, writes what it says to
//! the log, and ends the turn in the store. [`super`] draws the states.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};

use super::{
    Ask, Held, Run, Shared,
    events::{self, Completed, Delta, Event, Started},
    lock,
    log::End,
    look, outcome, to_ms,
};
use crate::{
    error::{Error, Recorded},
    history::{self, History, Wanted},
    langchain,
    message::{ANSWER_BYTES_MAX, Draft, Json, Role, SessionId, now_ms, stored_messages},
    metrics::{self, Outcome},
    model::{self, FinishReason, Piece, Prompt},
    store::{
        self, Body, Store,
        turns::{EndTurn, FollowTurn, KeepTurn, Kept, Lease, Stop, TurnId, TurnState},
    },
    tokens::Tokenizer,
    window::Purpose,
};

/// How often what was said is written to the store's log while somebody reads it there.
const WRITE_EVERY: Duration = Duration::from_millis(250);
/// How often it is written, and the store asked whether the turn is to stop, in any case. Who stops a
/// turn from elsewhere waits little longer ([`super::STOP_PATIENCE`]).
const KEEP_EVERY: Duration = Duration::from_millis(500);
/// So many new events are written sooner: a fast model must not use up what is reserved.
const WRITE_EVENTS: i64 = super::RESERVE / 8;
/// How long a turn that is to stop without followers waits for one to come back.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// How long a follower at another server counts after it was last noted.
const FOLLOWED_MS: i64 = 3_000;
/// The first pause before a turn is stored once more; it doubles up to [`STORE_PAUSE_MAX`].
const STORE_PAUSE_MIN: Duration = Duration::from_millis(100);
const STORE_PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long an answer is kept for a store that does not take it.
const KEEP_LIMIT: Duration = Duration::from_secs(60 * 60);
/// Bytes of a log at most. Text takes little more here than in the answer.
const LOG_BYTES_MAX: usize = 8 << 20;
/// How long a turn that is given up may take to say so.
const RELEASE_LIMIT: Duration = Duration::from_millis(500);

pub(super) struct Runner {
    shared: Arc<Shared>,
    held: Arc<Held>,
    run: Run,
    _counted: metrics::Lasting,
}

/// A complete answer that the store has not taken yet.
struct KeptAnswer {
    _room: OwnedSemaphorePermit,
    _counted: [metrics::Lasting; 2],
}

impl Drop for Runner {
    fn drop(&mut self) {
        // A turn that panicked must not leave its followers waiting.
        self.held.log.end(End::Moved);
        self.release();
    }
}

/// An answer, as far as it has come.
#[derive(Default)]
pub(super) struct Answer {
    text: String,
    reasoning: String,
    tool_call_bytes: usize,
}

impl Answer {
    fn size(&self) -> usize {
        self.text.len() + self.reasoning.len() + self.tool_call_bytes
    }

    fn add(&mut self, delta: &Delta) {
        self.text.push_str(&delta.text);
        self.reasoning.push_str(&delta.reasoning);
        for call in &delta.tool_calls {
            self.tool_call_bytes += call.arguments.len();
        }
    }

    /// The answer as a message, without tool calls.
    pub(super) fn draft(self) -> Draft {
        let mut draft = Draft::text(Role::Assistant, self.text);
        draft.reasoning = Some(self.reasoning).filter(|reasoning| !reasoning.is_empty());
        draft
    }
}

/// Reads from the log what the last attempt at a turn said.
pub(super) async fn read_answer(
    store: &dyn Store,
    session: &SessionId,
    turn: TurnId,
) -> Result<Answer, Error> {
    let mut answer = Answer::default();
    let mut follow = FollowTurn {
        from_chunk: 0,
        bytes_max: LOG_BYTES_MAX,
        ..look(turn)
    };
    loop {
        let found = store.follow_turn(session, follow).await?;
        let found = found.ok_or(store::Error::Cleared)?;
        for chunk in &found.chunks {
            for (_, event) in events::read_chunk(chunk)? {
                match event {
                    Event::Started(_) => answer = Answer::default(),
                    Event::Delta(delta) => answer.add(&delta),
                    Event::Completed(_) => {}
                }
            }
        }
        if !found.more {
            return Ok(answer);
        }
        follow.from_chunk = found.next_chunk;
    }
}

/// How the model's part of a turn ended.
enum Ending {
    Complete(model::End),
    Stopped(Stop),
    Failed(Error),
    /// The turn is not this server's any more.
    Lost(Outcome),
    /// This server stops.
    GivenUp,
}

impl Runner {
    pub(super) fn new(shared: Arc<Shared>, held: Arc<Held>, run: Run) -> Self {
        Self {
            shared,
            held,
            run,
            _counted: metrics::turn_runs(),
        }
    }

    pub(super) async fn run(self) {
        metrics::turn_ended(self.run_to_end().await);
    }

    async fn run_to_end(&self) -> Outcome {
        let ask = match (self.shared.parse)(&self.run.leased.request) {
            Ok(ask) => ask,
            Err(error) => return self.fail(error).await,
        };
        let mut answer = Answer::default();
        let ending = match self.run.leased.stop {
            // Its last holder did not come to stop it.
            Some(stop) => {
                let store = &*self.shared.store;
                match read_answer(store, &self.run.session, self.run.turn).await {
                    Ok(said) => {
                        answer = said;
                        Ending::Stopped(stop)
                    }
                    Err(_) => Ending::GivenUp,
                }
            }
            None => {
                let limit = self.shared.settings.turn_limit;
                let abort = self.shared.abort.clone();
                tokio::select! {
                    biased;
                    () = abort.cancelled() => Ending::GivenUp,
                    ending = self.keep(ask.stop_on_disconnect) => ending,
                    asked = timeout(limit, self.ask(&ask, &mut answer)) => match asked {
                        Ok(Ok(end)) => Ending::Complete(end),
                        Ok(Err(error)) => Ending::Failed(error),
                        Err(_) => Ending::Failed(Error::TurnTooLong { limit }),
                    },
                }
            }
        };
        match ending {
            Ending::Complete(end) => self.store(ask, answer, Some(end)).await,
            Ending::Stopped(Stop::Keep) if !answer.text.is_empty() => {
                self.store(ask, answer, None).await
            }
            Ending::Stopped(_) => self.fail(Error::TurnStopped).await,
            Ending::Failed(error) => self.fail(error).await,
            Ending::Lost(outcome) => outcome,
            Ending::GivenUp => self.give_up().await,
        }
    }

    /// Keeps the lease and writes the log, until the turn is to end.
    async fn keep(&self, stop_on_disconnect: bool) -> Ending {
        // Turns that began together do not write together.
        let phase = WRITE_EVERY.mul_f64(f64::from(self.held.turn[0]) / 256.0);
        let mut ticks = interval_at(Instant::now() + phase, WRITE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut kept_at: Option<Instant> = None;
        let mut alone_since: Option<Instant> = None;
        let mut is_followed_elsewhere = false;
        loop {
            let (is_poked, now) = tokio::select! {
                biased;
                () = self.held.poke.notified() => (true, Instant::now()),
                tick = ticks.tick() => (false, tick),
            };
            if stop_on_disconnect {
                let is_followed = *self.held.followers.borrow() > 0 || is_followed_elsewhere;
                match alone_since {
                    _ if is_followed => alone_since = None,
                    None => alone_since = Some(Instant::now()),
                    Some(since) if since.elapsed() >= STOP_GRACE => {
                        return Ending::Stopped(Stop::Keep);
                    }
                    Some(_) => {}
                }
            }
            let unwritten = self.held.log.unwritten();
            let since = kept_at.map_or(KEEP_EVERY, |kept_at| now - kept_at);
            if !is_poked && !is_due(unwritten, is_followed_elsewhere, since) {
                continue;
            }
            match self.keep_once().await {
                Ok(kept) => {
                    kept_at = Some(now);
                    is_followed_elsewhere = kept
                        .followed_ms_ago
                        .is_some_and(|ago_ms| ago_ms < FOLLOWED_MS);
                    if let Some(stop) = kept.stop {
                        return Ending::Stopped(stop);
                    }
                }
                Err(error @ (store::Error::LeaseLost | store::Error::Cleared)) => {
                    tracing::info!("a turn that ran here was taken or cleared");
                    return Ending::Lost(outcome_of(&error));
                }
                // The turn goes on: the store may be back before it ends.
                Err(error) => tracing::debug!(%error, "the log of a turn cannot be written"),
            }
        }
    }

    /// Gives history and new messages to the model, and passes on what it says.
    async fn ask(&self, ask: &Ask, answer: &mut Answer) -> Result<model::End, Error> {
        let mut begun_at = Some(Instant::now());
        let model = self.model(&ask.prompt).to_owned();
        let is_counted = ask.history.is_counted();
        let tokenizer = is_counted.then(|| Tokenizer::of_model(&model));
        let read = self.history(ask, tokenizer).await?;
        let messages = read.entries.into_iter().filter_map(|entry| entry.message);
        let history: Vec<Draft> = messages.map(|message| message.draft).collect();
        self.held.log.push(Event::Started(Started {
            turn_id: self.held.name.clone(),
            model,
            history_messages: history.len(),
            history_tokens: read.tokens,
            tokenizer: tokenizer.map_or("", Tokenizer::name).into(),
            attempt: self.run.leased.attempt,
        }));
        let mut prompt = ask.prompt.clone();
        prompt.messages = history;
        prompt.messages.extend(ask.drafts.iter().cloned());

        let mut log_bytes = 0;
        let mut pieces = self.shared.model.answer(prompt).await?;
        while let Some(piece) = pieces.next().await {
            let mut delta = Delta::default();
            match piece? {
                Piece::Text(text) => delta.text = text,
                Piece::Reasoning(reasoning) => delta.reasoning = reasoning,
                Piece::ToolCall(call) => {
                    log_bytes += CALL_BYTES;
                    delta.tool_calls.push(call);
                }
                Piece::End(end) => return Ok(end),
            }
            if let Some(begun_at) = begun_at.take() {
                metrics::first_token(begun_at.elapsed());
            }
            let before = answer.size();
            answer.add(&delta);
            log_bytes += answer.size() - before + PIECE_BYTES;
            if answer.size() > ANSWER_BYTES_MAX || log_bytes > LOG_BYTES_MAX {
                let limit = ANSWER_BYTES_MAX;
                return Err(Error::AnswerTooLarge { limit });
            }
            self.held.log.push(Event::Delta(delta));
        }
        let missing = "it ended without saying that it is complete";
        Err(model::Error::Broken(missing.to_owned()).into())
    }

    fn model<'a>(&'a self, prompt: &'a Prompt) -> &'a str {
        let default_model = self.shared.model.default_model();
        prompt.model.as_deref().unwrap_or(default_model)
    }

    /// What the model is given of the session.
    async fn history(&self, ask: &Ask, tokenizer: Option<Tokenizer>) -> Result<History, Error> {
        let system = ask.prompt.system.as_ref();
        let system = system.map(|text| Draft::text(Role::System, text));
        let wanted = Wanted {
            before: None,
            bounds: self.shared.bounds(ask.history),
            tokenizer,
            besides: system
                .into_iter()
                .chain(ask.drafts.iter().cloned())
                .collect(),
            purpose: Purpose::Asking(&ask.drafts),
            newest: lock(&self.run.newest).take(),
            bytes_max: history::BYTES_MAX,
            weigh: |element, _| match &element.body {
                Body::Bytes(bytes) => Some(bytes.len()),
                Body::TooLarge(_) => None,
            },
        };
        let read = history::read(&*self.shared.store, &self.run.session, wanted).await?;
        if read.is_cut_by_bytes {
            let limit = history::BYTES_MAX;
            return Err(Error::HistoryTooLarge { limit });
        }
        Ok(read)
    }

    /// Stores question and answer in one step. Without an end, the answer was stopped.
    async fn store(&self, ask: Ask, answer: Answer, end: Option<model::End>) -> Outcome {
        let mut draft = answer.draft();
        let interrupted = end.is_none();
        let mut finish_reason = FinishReason::Unspecified;
        let mut usage = None;
        if let Some(end) = end {
            draft.tool_calls = end.tool_calls;
            draft.usage = end.usage;
            finish_reason = end.finish_reason;
            usage = end.usage;
        }
        draft.langchain = response_metadata(self.model(&ask.prompt), finish_reason);

        let mut drafts = ask.drafts;
        drafts.push(draft);
        let time_ms = now_ms();
        let id_seed = format!("turn {}", self.held.name);
        let mut messages = stored_messages(&self.run.session, &id_seed, drafts, time_ms);
        for message in &mut messages {
            message.turn_id = Some(self.held.name.clone());
        }
        if let Some(answer) = messages.last_mut() {
            answer.interrupted = interrupted;
        }

        let elements = messages.iter().map(langchain::encode).collect();
        let state = self.end(elements, time_ms, |event_number| {
            outcome::write(&events::Outcome {
                event_number,
                finish_reason,
                usage,
            })
        });
        let (number, appended) = match state.await {
            Ok((number, TurnState::Completed { appended, .. })) => (number, appended),
            Ok(_) => return Outcome::Failed,
            Err(outcome) => return outcome,
        };
        let completed = Completed {
            messages: (appended.first_sequence..).zip(messages).collect(),
            usage,
            finish_reason,
        };
        let completed = Box::new(completed);
        self.release();
        self.held.log.end(End::Completed { number, completed });
        match interrupted {
            true => Outcome::Stopped,
            false => Outcome::Completed,
        }
    }

    /// Ends the turn without storing anything in the history.
    async fn fail(&self, error: Error) -> Outcome {
        if matches!(error, Error::Model(_)) {
            metrics::model_failed(error.reason().into_owned());
        }
        // By its reason only: a provider's own words may quote the conversation.
        tracing::info!(reason = &*error.reason(), "a turn failed");
        let recorded = outcome::write(&Recorded::of(&error));
        let outcome = match self.end(Vec::new(), now_ms(), |_| recorded).await {
            Ok(_) => {
                self.release();
                match error {
                    Error::TurnStopped => Outcome::Stopped,
                    _ => Outcome::Failed,
                }
            }
            Err(outcome) => outcome,
        };
        self.held.log.end(End::Failed(error));
        outcome
    }

    /// Makes room for the next turn on the session: who has the last event may begin it at once.
    fn release(&self) {
        let key = (self.held.session.clone(), self.held.turn);
        let mut held = lock(&self.shared.held);
        // A later attempt may have the place.
        if held
            .get(&key)
            .is_some_and(|known| Arc::ptr_eq(known, &self.held))
        {
            held.remove(&key);
        }
        lock(&self.run.permit).take();
    }

    /// Extends the lease and writes what is new to the store's log.
    async fn keep_once(&self) -> store::Result<Kept> {
        let kept = self.send_keep(self.run.lease).await?;
        self.held.log.written(self.run.lease.reserve);
        Ok(kept)
    }

    async fn send_keep(&self, lease: Lease) -> store::Result<Kept> {
        let (chunk, last_event) = self.held.log.chunk();
        let keep = KeepTurn {
            turn: self.run.turn,
            lease,
            chunk,
            last_event,
        };
        self.shared.store.keep_turn(&self.run.session, keep).await
    }

    /// Ends the turn in the store, however long that is away. Returns the number of the last event,
    /// and how the turn ended; an error if it did not, or is not this server's any more.
    async fn end(
        &self,
        elements: Vec<bytes::Bytes>,
        time_ms: i64,
        outcome: impl FnOnce(i64) -> bytes::Bytes,
    ) -> Result<(i64, TurnState), Outcome> {
        let since = Instant::now();
        let bytes: usize = elements.iter().map(bytes::Bytes::len).sum();
        let mut kept: Option<KeptAnswer> = None;
        let mut outcome = Some(outcome);
        let mut pause = STORE_PAUSE_MIN;
        let mut end: Option<(i64, EndTurn)> = None;
        loop {
            let tried = match &end {
                Some((number, end)) => {
                    let ended = self
                        .shared
                        .store
                        .end_turn(&self.run.session, end.clone())
                        .await;
                    ended.map(|state| Some((*number, state)))
                }
                // What was under way when the answer ended comes first.
                None => self.write_log().await.map(|()| None),
            };
            match tried {
                Ok(Some(ended)) => return Ok(ended),
                Ok(None) => {
                    let (chunk, _) = self.held.log.chunk();
                    let number = self.held.log.last_number();
                    end = outcome.take().map(|outcome| {
                        let end = EndTurn {
                            turn: self.run.turn,
                            token: self.run.lease.token,
                            retention_ms: to_ms(self.shared.settings.retention),
                            chunk,
                            elements: elements.clone(),
                            time_ms,
                            outcome: outcome(number),
                        };
                        (number, end)
                    });
                    continue;
                }
                Err(error) if is_final(&error) || since.elapsed() >= KEEP_LIMIT => {
                    tracing::info!(%error, "a turn that ran here cannot be ended");
                    let outcome = outcome_of(&error);
                    if outcome == Outcome::Failed && bytes > 0 {
                        metrics::kept_answer_dropped();
                    }
                    self.held.log.end(match error {
                        store::Error::LeaseLost => End::Moved,
                        error => End::Failed(error.into()),
                    });
                    return Err(outcome);
                }
                Err(error) => {
                    if kept.is_none() && bytes > 0 {
                        kept = self.keep_answer(bytes);
                        if kept.is_none() {
                            // Who asks again later runs the turn anew, as if this server had died.
                            tracing::warn!(%error, bytes, "no room to keep a turn for the store");
                            metrics::kept_answer_dropped();
                            self.held.log.end(End::Failed(error.into()));
                            return Err(Outcome::Failed);
                        }
                    }
                    if !self.held.log.has_ended() {
                        tracing::warn!(%error, "the store does not take a turn; it is kept here");
                    }
                    // Whoever follows learns it; who asks again waits until it is stored.
                    self.held.log.end(End::Failed(error.into()));
                }
            }
            tokio::select! {
                biased;
                () = self.shared.abort.cancelled() => {
                    if kept.is_some() {
                        metrics::kept_answer_dropped();
                    }
                    return Err(Outcome::Moved);
                }
                () = self.held.poke.notified() => {}
                () = sleep(pause) => {}
            }
            pause = (pause * 2).min(STORE_PAUSE_MAX);
        }
    }

    /// Makes room to keep an answer; `None` if there is none left.
    fn keep_answer(&self, bytes: usize) -> Option<KeptAnswer> {
        let size = u32::try_from(bytes).ok()?;
        let room = Arc::clone(&self.shared.kept_bytes).try_acquire_many_owned(size);
        Some(KeptAnswer {
            _room: room.ok()?,
            _counted: metrics::answer_kept(bytes),
        })
    }

    /// Writes what of the log must be written before the turn can end.
    async fn write_log(&self) -> store::Result<()> {
        while self.held.log.is_under_way() || self.held.log.is_holding() {
            self.keep_once().await?;
        }
        Ok(())
    }

    /// Leaves the turn to other servers, at once.
    async fn give_up(&self) -> Outcome {
        let lease = Lease {
            lease_ms: 0,
            ..self.run.lease
        };
        let released = self.send_keep(lease);
        if !matches!(timeout(RELEASE_LIMIT, released).await, Ok(Ok(_))) {
            tracing::debug!("a turn could not be given up; its lease runs out");
        }
        self.held.log.end(End::Failed(Error::ShuttingDown));
        Outcome::Moved
    }
}

/// Bytes that a piece takes in the log besides what it says, about.
const PIECE_BYTES: usize = 3;
/// And a piece of a tool call.
const CALL_BYTES: usize = 48;

/// Whether the log is to be written and the lease extended.
fn is_due(unwritten: i64, is_followed_elsewhere: bool, since: Duration) -> bool {
    since >= KEEP_EVERY || unwritten >= WRITE_EVENTS || is_followed_elsewhere && unwritten > 0
}

/// What a turn comes to that the store does not let this server end.
fn outcome_of(error: &store::Error) -> Outcome {
    match error {
        store::Error::LeaseLost => Outcome::Moved,
        store::Error::Cleared => Outcome::Cleared,
        _ => Outcome::Failed,
    }
}

/// Whether trying again is of no use.
fn is_final(error: &store::Error) -> bool {
    match error {
        store::Error::Unavailable(_) | store::Error::OutcomeUnknown(_) | store::Error::Full(_) => {
            false
        }
        store::Error::SequenceMismatch { .. }
        | store::Error::Cleared
        | store::Error::LeaseLost
        | store::Error::RequestReused
        | store::Error::WrongKeyType { .. }
        | store::Error::Corrupt(_) => true,
    }
}

/// What LangChain's own chat models note with an answer.
fn response_metadata(model: &str, finish_reason: FinishReason) -> Option<Json> {
    let finish_reason = match finish_reason {
        FinishReason::Unspecified => None,
        FinishReason::Stop => Some("stop"),
        FinishReason::Length => Some("length"),
        FinishReason::ToolCalls => Some("tool_calls"),
        FinishReason::ContentFilter => Some("content_filter"),
        FinishReason::Other => Some("other"),
    };
    let metadata = serde_json::json!({
        "response_metadata": { "model_name": model, "finish_reason": finish_reason },
    });
    Json::parse("langchain", &metadata.to_string()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_written_sooner_for_who_reads_it_and_for_a_fast_model() {
        let (early, late) = (WRITE_EVERY, KEEP_EVERY);
        assert!(!is_due(0, false, early) && !is_due(9, false, early));
        assert!(is_due(1, true, early) && !is_due(0, true, early));
        assert!(is_due(WRITE_EVENTS, false, early));
        assert!(is_due(0, false, late));
    }
}
