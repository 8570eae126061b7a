//! A chat turn: history and new messages to the model, its answer to the client, both to the
//! store. Knows neither gRPC nor which store and which model it has.
//!
//! A turn is a task of its own. It writes its [`Event`]s to a [`log`], from which the
//! client's stream, the [`Follower`], takes them: a slow client holds up neither the model nor the
//! store, and a client that leaves does not end the turn unless it asked for that.
//!
//! ```text
//! read history → Started → ask the model → Delta… → append to the store → Completed
//!        └──────────────┴───────── an Error ends it; nothing is stored ┘
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::StreamExt as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    error::Error,
    langchain,
    message::{
        ANSWER_BYTES_MAX, Draft, Json, Message, PAGE_BYTES_MAX, Role, SessionId, Usage, now_ms,
        stored_messages,
    },
    model::{self, FinishReason, Model, Piece, Prompt},
    store::{Append, Appended, Body, Element, Epoch, Order, Read, RequestKey, Sequence, Store},
    window,
};

pub use log::Follower;

mod log;

/// Bytes of stored history that one turn reads, at most. Models take far less.
const HISTORY_BYTES_MAX: usize = 16 << 20;

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct Ask {
    pub session: SessionId,
    /// Names the turn.
    pub turn_id: String,
    /// Whether the client chose `turn_id`, so that there may be a stored turn of that name.
    pub may_be_repeated: bool,
    /// The write's key, made of the turn id and of all that was asked.
    pub request: RequestKey,
    /// The new messages.
    pub drafts: Vec<Draft>,
    /// The model, system prompt, tools and options. Its messages are filled in by the turn.
    pub prompt: Prompt,
    /// Messages of history at most.
    pub history_messages: Option<usize>,
    /// Whether the turn ends when its client leaves.
    pub stop_on_disconnect: bool,
    /// When the caller gives up.
    pub deadline: Option<Instant>,
}

/// What happens in a turn.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Started {
        turn_id: String,
        model: String,
        history_messages: usize,
    },
    Delta(Delta),
    Completed {
        /// The messages as stored, with their sequences.
        messages: Vec<(Sequence, Message)>,
        usage: Option<Usage>,
        finish_reason: FinishReason,
    },
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    pub text: String,
    pub reasoning: String,
    pub tool_calls: Vec<model::ToolCallPiece>,
}

/// How turns are run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Messages of history if the client does not say.
    pub history_messages: usize,
    /// How long a turn may take.
    pub turn_limit: Duration,
    /// How many may run at once.
    pub turns_max: usize,
}

/// Runs turns.
#[derive(Clone)]
pub struct Turns(Arc<Shared>);

struct Shared {
    store: Arc<dyn Store>,
    model: Arc<dyn Model>,
    settings: Settings,
    /// The running turn of each session that has one.
    running: Mutex<HashMap<SessionId, String>>,
    permits: Arc<Semaphore>,
    tasks: TaskTracker,
    /// Ends all turns.
    abort: CancellationToken,
}

impl Turns {
    pub fn new(store: Arc<dyn Store>, model: Arc<dyn Model>, settings: Settings) -> Self {
        Self(Arc::new(Shared {
            permits: Arc::new(Semaphore::new(settings.turns_max)),
            store,
            model,
            settings,
            running: Mutex::default(),
            tasks: TaskTracker::new(),
            abort: CancellationToken::new(),
        }))
    }

    /// Starts a turn. Dropping the follower ends it only if the client asked for that.
    pub fn start(&self, ask: Ask) -> Result<Follower, Error> {
        let shared = &self.0;
        if shared.tasks.is_closed() {
            return Err(Error::ShuttingDown);
        }
        let permit = shared.permits.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::TooManyTurns {
            limit: shared.settings.turns_max,
        })?;
        let place = Place::take(shared, &ask, permit)?;
        let (writer, follower) = log::new();
        let turn = Turn {
            shared: Arc::clone(shared),
            ask,
            log: writer,
        };
        shared.tasks.spawn(turn.run(place));
        Ok(follower)
    }

    /// Takes no more turns and waits for the running ones to end.
    pub async fn finish(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Takes no more turns and ends the running ones; nothing of them is stored.
    pub fn abort(&self) {
        self.0.tasks.close();
        self.0.abort.cancel();
    }

    /// How many turns run now.
    pub fn running(&self) -> usize {
        self.0.tasks.len()
    }
}

/// A session's place for its one running turn. Dropping it makes room for the next.
struct Place {
    shared: Arc<Shared>,
    session: SessionId,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    fn take(shared: &Arc<Shared>, ask: &Ask, permit: OwnedSemaphorePermit) -> Result<Self, Error> {
        let mut running = lock(&shared.running);
        if let Some(turn_id) = running.get(&ask.session) {
            let turn_id = turn_id.clone();
            return Err(Error::TurnInProgress { turn_id });
        }
        running.insert(ask.session.clone(), ask.turn_id.clone());
        Ok(Self {
            shared: Arc::clone(shared),
            session: ask.session.clone(),
            _permit: permit,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.shared.running).remove(&self.session);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside stays right when a thread panics: each change is one step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One turn, as it runs.
struct Turn {
    shared: Arc<Shared>,
    ask: Ask,
    log: log::Writer,
}

/// An answer, as far as it has come.
#[derive(Default)]
struct Answer {
    text: String,
    reasoning: String,
    tool_call_bytes: usize,
}

impl Answer {
    fn size(&self) -> usize {
        self.text.len() + self.reasoning.len() + self.tool_call_bytes
    }
}

/// How the model's part of a turn ended.
enum Ending {
    Complete(model::End),
    /// The client left and wanted the turn to end with it.
    Stopped,
}

impl Turn {
    async fn run(self, place: Place) {
        let now = Instant::now();
        let turn_limit = self.shared.settings.turn_limit;
        let limit = now + turn_limit;
        let deadline = self.ask.deadline.filter(|deadline| *deadline < limit);
        let ends_at = deadline.unwrap_or(limit);
        let abort = self.shared.abort.clone();
        let outcome = tokio::select! {
            outcome = timeout_at(ends_at, self.steps()) => match outcome {
                Ok(outcome) => outcome,
                Err(_) if deadline.is_some() => Err(Error::DeadlineExceeded {
                    may_be_stored: self.log.is_storing(),
                }),
                Err(_) => Err(Error::TurnTooLong { limit: turn_limit }),
            },
            () = abort.cancelled() => Err(Error::ShuttingDown),
        };
        if let Err(error) = &outcome {
            // By its reason only: a provider's own words may quote the conversation.
            tracing::info!(reason = error.reason(), "a turn ended without being stored");
        }
        // A client that has its `completed` may start the next turn at once.
        drop(place);
        self.log.end(outcome);
    }

    async fn steps(&self) -> Result<Option<Event>, Error> {
        if self.ask.may_be_repeated {
            let stored = self
                .shared
                .store
                .recall(&self.ask.session, &self.ask.request)
                .await;
            if let Some(appended) = stored.map_err(|error| Error::of_write(error, "turn_id"))? {
                return self.tell_again(appended).await.map(Some);
            }
        }
        let (history, epoch) = self.history().await?;
        self.started(history.len());

        let mut prompt = self.ask.prompt.clone();
        prompt.messages = history;
        prompt.messages.extend(self.ask.drafts.iter().cloned());
        let mut answer = Answer::default();
        let ending = tokio::select! {
            ending = self.ask_model(prompt, &mut answer) => ending?,
            () = self.log.abandoned(), if self.ask.stop_on_disconnect => Ending::Stopped,
        };
        if matches!(ending, Ending::Stopped) && answer.text.is_empty() {
            return Ok(None);
        }
        self.store(answer, ending, epoch).await.map(Some)
    }

    fn started(&self, history_messages: usize) {
        let model = self.ask.prompt.model.as_deref();
        self.log.push(Event::Started {
            turn_id: self.ask.turn_id.clone(),
            model: model
                .unwrap_or(self.shared.model.default_model())
                .to_owned(),
            history_messages,
        });
    }

    /// The newest messages of the session that can be read, oldest first.
    async fn history(&self) -> Result<(Vec<Draft>, Epoch), Error> {
        let settings = &self.shared.settings;
        let wanted = self
            .ask
            .history_messages
            .unwrap_or(settings.history_messages);
        let mut newest: Vec<Element> = Vec::new();
        let mut bytes_left = HISTORY_BYTES_MAX;
        let mut before = None;
        let epoch = loop {
            let read = Read {
                order: Order::NewestFirst,
                after: 0,
                before,
                last: None,
                limit: (wanted - newest.len()).max(1),
                bytes_max: PAGE_BYTES_MAX,
            };
            let page = self.shared.store.read(&self.ask.session, read).await?;
            for element in page.elements {
                if let Body::Bytes(bytes) = &element.body {
                    bytes_left =
                        bytes_left
                            .checked_sub(bytes.len())
                            .ok_or(Error::HistoryTooLarge {
                                limit: HISTORY_BYTES_MAX,
                            })?;
                }
                before = Some(element.sequence);
                newest.push(element);
            }
            if !page.more || newest.len() >= wanted {
                break page.epoch;
            }
        };
        newest.truncate(wanted);
        newest.reverse();
        let messages = newest.iter().filter_map(read_message).collect();
        Ok((window::choose(messages), epoch))
    }

    /// Asks the model and passes on what it says.
    async fn ask_model(&self, prompt: Prompt, answer: &mut Answer) -> Result<Ending, Error> {
        let mut pieces = self.shared.model.answer(prompt).await?;
        while let Some(piece) = pieces.next().await {
            let mut delta = Delta::default();
            match piece? {
                Piece::Text(text) => {
                    answer.text.push_str(&text);
                    delta.text = text;
                }
                Piece::Reasoning(reasoning) => {
                    answer.reasoning.push_str(&reasoning);
                    delta.reasoning = reasoning;
                }
                Piece::ToolCall(call) => {
                    answer.tool_call_bytes += call.arguments.len();
                    delta.tool_calls.push(call);
                }
                Piece::End(end) => return Ok(Ending::Complete(end)),
            }
            if answer.size() > ANSWER_BYTES_MAX {
                let limit = ANSWER_BYTES_MAX;
                return Err(Error::AnswerTooLarge { limit });
            }
            self.log.push(Event::Delta(delta));
        }
        let missing = "it ended without saying that it is complete";
        Err(model::Error::Broken(missing.to_owned()).into())
    }

    /// Stores question and answer in one step.
    async fn store(&self, answer: Answer, ending: Ending, epoch: Epoch) -> Result<Event, Error> {
        let ask = &self.ask;
        let mut draft = Draft::text(Role::Assistant, answer.text);
        draft.reasoning = Some(answer.reasoning).filter(|reasoning| !reasoning.is_empty());
        let mut finish_reason = FinishReason::Unspecified;
        let mut usage = None;
        let interrupted = matches!(ending, Ending::Stopped);
        if let Ending::Complete(end) = ending {
            draft.tool_calls = end.tool_calls;
            draft.usage = end.usage;
            finish_reason = end.finish_reason;
            usage = end.usage;
        }
        let default_model = self.shared.model.default_model();
        let model = ask.prompt.model.as_deref().unwrap_or(default_model);
        draft.langchain = response_metadata(model, finish_reason);

        let mut drafts = ask.drafts.clone();
        drafts.push(draft);
        let time_ms = now_ms();
        let id_seed = format!("turn {}", ask.turn_id);
        let mut messages = stored_messages(&ask.session, &id_seed, drafts, time_ms);
        for message in &mut messages {
            message.turn_id = Some(ask.turn_id.clone());
        }
        if let Some(answer) = messages.last_mut() {
            answer.interrupted = interrupted;
        }
        let append = Append {
            elements: messages.iter().map(langchain::encode).collect(),
            request: ask.request,
            time_ms,
            expected_last_sequence: None,
            expected_epoch: Some(epoch),
        };
        self.log.storing();
        let appended = self.shared.store.append(&ask.session, append).await;
        let appended = appended.map_err(|error| Error::of_write(error, "turn_id"))?;
        if appended.repeated {
            // Another server ran the same turn and was quicker: its answer is the stored one.
            let messages = self.stored(appended).await?;
            return Ok(completed(messages, usage, finish_reason));
        }
        let messages = (appended.first_sequence..).zip(messages).collect();
        Ok(completed(messages, usage, finish_reason))
    }

    /// Tells a turn that was stored before, as if it ran now.
    async fn tell_again(&self, appended: Appended) -> Result<Event, Error> {
        let messages = self.stored(appended).await?;
        self.started(0);
        let answer = messages.last().map(|(_, message)| &message.draft);
        if let Some(answer) = answer {
            let calls = answer.tool_calls.iter().enumerate();
            let delta = Delta {
                text: answer.content.text(),
                reasoning: answer.reasoning.clone().unwrap_or_default(),
                tool_calls: calls
                    .map(|(index, call)| model::ToolCallPiece {
                        index,
                        id: Some(call.id.clone()),
                        name: Some(call.name.clone()),
                        arguments: call.arguments.as_str().to_owned(),
                    })
                    .collect(),
            };
            if delta != Delta::default() {
                self.log.push(Event::Delta(delta));
            }
        }
        let usage = answer.and_then(|answer| answer.usage);
        Ok(completed(messages, usage, FinishReason::Unspecified))
    }

    /// The stored messages of an append.
    async fn stored(&self, appended: Appended) -> Result<Vec<(Sequence, Message)>, Error> {
        let mut messages = Vec::with_capacity(appended.count);
        let end = appended.first_sequence + appended.count as Sequence;
        while messages.len() < appended.count {
            let next = appended.first_sequence + messages.len() as Sequence;
            let read = Read {
                order: Order::OldestFirst,
                after: next - 1,
                before: Some(end),
                last: None,
                limit: appended.count - messages.len(),
                bytes_max: PAGE_BYTES_MAX,
            };
            let page = self.shared.store.read(&self.ask.session, read).await?;
            if page.elements.is_empty() {
                // Somebody deleted them since.
                return Err(crate::store::Error::Cleared.into());
            }
            for element in &page.elements {
                let message = read_message(element).ok_or(Error::Internal)?;
                messages.push((element.sequence, message));
            }
        }
        Ok(messages)
    }
}

fn completed(
    messages: Vec<(Sequence, Message)>,
    usage: Option<Usage>,
    finish_reason: FinishReason,
) -> Event {
    Event::Completed {
        messages,
        usage,
        finish_reason,
    }
}

fn read_message(element: &Element) -> Option<Message> {
    match &element.body {
        Body::Bytes(bytes) => langchain::decode(bytes).ok(),
        Body::TooLarge(_) => None,
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
