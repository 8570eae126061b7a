//! The gRPC methods: each parses, calls, renders. Decides nothing itself.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::{Stream, stream};
use http::HeaderMap;
use prost::Message as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tonic::{Request, Response, Status};
use ulid::Ulid;

use crate::{
    error::Error,
    history::{self, Asked, Wanted},
    langchain,
    message::{
        BATCH_BYTES_MAX, Draft, MESSAGE_BYTES_MAX, NAME_BYTES_MAX, PAGE_BYTES_MAX,
        PAGE_MESSAGES_MAX, Role, SessionId, TURN_BYTES_MAX, Violation, check_name, now_ms,
        stored_messages,
    },
    model::Prompt,
    pb,
    sessions::Sessions,
    store::{self, Append, RequestKey, Store, sessions::Rewind, turns::Stop},
    tokens::Tokenizer,
    turn::{Ask, Call, Event, Follower, OnConflict, Turns},
    watch::Watch,
    window::Purpose,
    wire::{self, MessagesRequest, WindowRequest, sessions},
};

/// Sessions that a list asks the store for at once: with titles, metadata and errors of turns of the
/// largest size, they take less than half a page.
const LISTED_AT_ONCE: usize = 100;

/// The service `chatmemory.v1.ChatMemory`.
#[derive(Clone)]
pub struct Service {
    store: Arc<dyn Store>,
    turns: Turns,
    sessions: Sessions,
    requests: Arc<Semaphore>,
    requests_max: usize,
    watchers: Watchers,
    /// Has a token for each call that is under way, streams included.
    calls: TaskTracker,
}

/// How much is served at once.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Unary calls at once, at most.
    pub requests_max: usize,
    /// Watchers at once, at most.
    pub watchers_max: usize,
    /// How long a watcher's caller may take nothing although there is something.
    pub watcher_patience: Duration,
}

/// Proof that a call was let in. While it lives, the call counts.
struct Entry {
    _call: TaskTrackerToken,
    _permit: OwnedSemaphorePermit,
}

impl Service {
    /// Serves within limits; `turns` has its own.
    pub fn new(store: Arc<dyn Store>, turns: Turns, limits: Limits) -> Self {
        let Limits {
            requests_max,
            watchers_max,
            watcher_patience,
        } = limits;
        Self {
            sessions: Sessions::new(Arc::clone(&store), turns.clone()),
            store,
            turns,
            requests: Arc::new(Semaphore::new(requests_max)),
            requests_max,
            watchers: Watchers {
                permits: Arc::new(Semaphore::new(watchers_max)),
                max: watchers_max,
                patience: watcher_patience,
                closing: CancellationToken::new(),
            },
            calls: TaskTracker::new(),
        }
    }

    /// Waits until no call is under way. Calls that come later are served still.
    pub async fn idle(&self) {
        self.calls.close();
        self.calls.wait().await;
    }

    /// Sends all watchers away: they do not end by themselves.
    pub fn end_watchers(&self) {
        self.watchers.closing.cancel();
    }

    fn enter(&self) -> Result<Entry, Error> {
        let permit = self.requests.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::TooManyRequests {
            limit: self.requests_max,
        })?;
        Ok(Entry {
            _call: self.calls.token(),
            _permit: permit,
        })
    }
}

impl Service {
    async fn window(&self, request: WindowRequest) -> Result<pb::GetMessagesResponse, Error> {
        let model = Some(request.model.as_str()).filter(|model| !model.is_empty());
        let tokenizer = Tokenizer::of_model(model.unwrap_or(self.turns.default_model()));
        let wanted = Wanted {
            before: request.before,
            bounds: request.bounds,
            tokenizer: Some(tokenizer),
            besides: Vec::new(),
            purpose: Purpose::Reading,
            newest: None,
            bytes_max: wire::WINDOW_BYTES_MAX,
            weigh: wire::weigh(request.include_raw),
        };
        let window = history::read(&*self.store, &request.session, wanted).await?;
        Ok(wire::render_window(request.include_raw, window, tokenizer))
    }
}

type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;
type ChatStream = Pin<Box<dyn Stream<Item = Result<pb::ChatResponse, Status>> + Send>>;

#[tonic::async_trait]
impl pb::chat_memory_server::ChatMemory for Service {
    async fn append(
        &self,
        request: Request<pb::AppendRequest>,
    ) -> Result<Response<pb::AppendResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let call = AppendCall::parse(request.into_inner())?;

        let time_ms = now_ms();
        let are_given: Vec<bool> = call.drafts.iter().map(|draft| draft.id.is_some()).collect();
        let seed = format!("append {}", call.request_id);
        let stored = |drafts, time_ms| stored_messages(&call.session, &seed, drafts, time_ms);
        let mut messages = stored(call.drafts, time_ms);
        let append = Append {
            elements: messages.iter().map(langchain::encode).collect(),
            request: call.key,
            time_ms,
            expected_last_sequence: call.expected_last_sequence,
            expected_epoch: None,
        };
        let appended = within(deadline, true, self.store.append(&call.session, append)).await?;
        let appended = appended.map_err(|error| Error::of_write(error, "request_id"))?;

        if appended.time_ms != time_ms {
            // A repeated request is answered as the first one was: same times, same ids.
            let drafts = messages.into_iter().zip(are_given);
            let drafts = drafts.map(|(message, is_given)| Draft {
                id: message.draft.id.filter(|_| is_given),
                ..message.draft
            });
            messages = stored(drafts.collect(), appended.time_ms);
        }
        let numbered = (appended.first_sequence..).zip(messages);
        Ok(Response::new(pb::AppendResponse {
            messages: wire::render_stored(numbered),
        }))
    }

    async fn get_messages(
        &self,
        request: Request<pb::GetMessagesRequest>,
    ) -> Result<Response<pb::GetMessagesResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let request = wire::parse_messages_request(request.into_inner()).map_err(Error::from)?;

        let response = match request {
            MessagesRequest::Page(request) => {
                let read = self.store.read(&request.session, request.read);
                let page = within(deadline, false, read).await?.map_err(Error::from)?;
                wire::render_page(&request, page)
            }
            MessagesRequest::Window(request) => {
                within(deadline, false, self.window(request)).await??
            }
        };

        Ok(Response::new(response))
    }

    async fn clear(
        &self,
        request: Request<pb::ClearRequest>,
    ) -> Result<Response<pb::ClearResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let session = SessionId::parse(request.into_inner().session_id).map_err(Error::from)?;

        let deleted = within(deadline, true, self.store.clear(&session)).await?;
        let deleted_count = deleted.map_err(Error::from)?;

        Ok(Response::new(pb::ClearResponse { deleted_count }))
    }

    type ChatStream = ChatStream;

    async fn chat(
        &self,
        request: Request<pb::ChatRequest>,
    ) -> Result<Response<ChatStream>, Status> {
        let call = self.calls.token();
        let deadline = deadline(&request);
        let chat = parse_call(request.into_inner())?;

        let follower = until(deadline, self.turns.chat(chat)).await??;

        Ok(Response::new(Box::pin(events(follower, deadline, call))))
    }

    async fn stop_chat(
        &self,
        request: Request<pb::StopChatRequest>,
    ) -> Result<Response<pb::StopChatResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let request = request.into_inner();
        let session = SessionId::parse(request.session_id).map_err(Error::from)?;
        check_name("turn_id", &request.turn_id, NAME_BYTES_MAX).map_err(Error::from)?;
        let turn = Some(request.turn_id).filter(|id| !id.is_empty());
        let turn = turn.map(|id| (RequestKey::new("turn", &id, &[]).id, id));
        let stop = match request.discard {
            true => Stop::Discard,
            false => Stop::Keep,
        };

        let stopped = until(deadline, self.turns.stop(&session, turn, stop)).await?;
        let (turn_id, messages) = stopped?;

        Ok(Response::new(pb::StopChatResponse {
            turn_id,
            messages: wire::render_stored(messages),
        }))
    }

    type WatchStream = WatchStream;

    async fn watch(
        &self,
        request: Request<pb::WatchRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        let deadline = deadline(&request);
        let (session, after, include_raw) =
            sessions::parse_watch(request.into_inner()).map_err(Error::from)?;
        let watcher = Watcher {
            _permit: self.watchers.enter()?,
            _call: self.calls.token(),
            watch: Watch::new(Arc::clone(&self.store), session, after),
            include_raw,
            patience: self.watchers.patience,
        };
        let ended = self.watchers.closing.clone();
        Ok(Response::new(Box::pin(watcher.stream(deadline, ended))))
    }

    async fn get_session(
        &self,
        request: Request<pb::GetSessionRequest>,
    ) -> Result<Response<pb::GetSessionResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let session = SessionId::parse(request.into_inner().session_id).map_err(Error::from)?;

        let portrait = within(deadline, false, self.sessions.get(&session)).await??;

        Ok(Response::new(pb::GetSessionResponse {
            session: Some(sessions::render_portrait(&session, &portrait)),
        }))
    }

    async fn update_session(
        &self,
        request: Request<pb::UpdateSessionRequest>,
    ) -> Result<Response<pb::UpdateSessionResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let (session, update) =
            sessions::parse_update(request.into_inner()).map_err(Error::from)?;

        let seen = within(deadline, true, self.sessions.update(&session, update)).await??;

        Ok(Response::new(pb::UpdateSessionResponse {
            session: Some(sessions::render_session(&session, &seen)),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let (mut list, scope) = sessions::parse_list(request.into_inner()).map_err(Error::from)?;
        let wanted = list.limit;

        let mut answer = pb::ListSessionsResponse::default();
        loop {
            list.limit = (wanted - answer.sessions.len()).min(LISTED_AT_ONCE);
            let part = self.sessions.list(list.clone());
            let part = within(deadline, false, part).await??;
            let is_whole = part.sessions.len() == list.limit;
            list.cursor.clone_from(&part.next);
            let part = sessions::render_list(&part, &scope);
            answer.sessions.extend(part.sessions);
            answer.next_page_token = part.next_page_token;
            let has_room =
                answer.sessions.len() < wanted && answer.encoded_len() < PAGE_BYTES_MAX / 2;
            if list.cursor.is_none() || !is_whole || !has_room {
                return Ok(Response::new(answer));
            }
        }
    }

    async fn rewind(
        &self,
        request: Request<pb::RewindRequest>,
    ) -> Result<Response<pb::RewindResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let call = RewindCall::parse(request.into_inner())?;

        let rewound = self
            .sessions
            .rewind(&call.session, call.rewind, call.stops_turn);
        let deleted_count = within(deadline, true, rewound).await??;

        Ok(Response::new(pb::RewindResponse { deleted_count }))
    }

    async fn fork(
        &self,
        request: Request<pb::ForkRequest>,
    ) -> Result<Response<pb::ForkResponse>, Status> {
        let _entry = self.enter()?;
        let deadline = deadline(&request);
        let (session, fork) = sessions::parse_fork(request.into_inner()).map_err(Error::from)?;
        let to = fork.to.clone();

        let seen = within(deadline, true, self.sessions.fork(&session, fork)).await??;

        Ok(Response::new(pb::ForkResponse {
            session: Some(sessions::render_session(&to, &seen)),
        }))
    }
}

/// Who watches, and how many may.
#[derive(Clone)]
struct Watchers {
    permits: Arc<Semaphore>,
    max: usize,
    patience: Duration,
    /// Ends all of them.
    closing: CancellationToken,
}

impl Watchers {
    fn enter(&self) -> Result<OwnedSemaphorePermit, Error> {
        if self.closing.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        let permit = self.permits.clone().try_acquire_owned();
        permit.map_err(|_| Error::TooManyWatchers { limit: self.max })
    }
}

/// A watcher and its caller.
struct Watcher {
    watch: Watch,
    include_raw: bool,
    /// How long the caller may take nothing although there is something.
    patience: Duration,
    _permit: OwnedSemaphorePermit,
    _call: TaskTrackerToken,
}

impl Watcher {
    /// What the caller is told. A task of its own finds out when the caller takes nothing: nobody
    /// asks a stream for more then.
    fn stream(
        mut self,
        deadline: Option<Instant>,
        closing: CancellationToken,
    ) -> impl Stream<Item = Result<pb::WatchResponse, Status>> + Send {
        let (notices, taken) = mpsc::channel(1);
        let ended = Arc::new(OnceLock::new());
        let end = Arc::clone(&ended);
        tokio::spawn(async move {
            let error = tokio::select! {
                () = closing.cancelled() => Error::ShuttingDown,
                () = notices.closed() => return,
                given = within(deadline, false, self.give(&notices)) => match given {
                    Ok(Err(error)) | Err(error) => error,
                },
            };
            // Read once the caller has taken what is in the channel.
            let _ = end.set(error);
        });
        stream::unfold(Some((taken, ended)), |state| async move {
            let (mut taken, ended) = state?;
            if let Some(notice) = taken.recv().await {
                return Some((Ok(notice), Some((taken, ended))));
            }
            let error = ended.get().cloned().unwrap_or(Error::Internal);
            Some((Err(error.into()), None))
        })
    }

    /// Gives notices until that cannot go on.
    async fn give(
        &mut self,
        notices: &mpsc::Sender<pb::WatchResponse>,
    ) -> Result<Infallible, Error> {
        let limit = self.patience;
        loop {
            let notice = self.watch.next().await?;
            let shown = sessions::render_notice(notice, self.include_raw);
            let taken = timeout(limit, notices.send(shown)).await;
            // That the caller is gone ends this from outside.
            taken.map_err(|_| Error::WatcherTooSlow { limit })?.ok();
        }
    }
}

/// The events of a turn, as a stream that ends with the turn, or with the caller's deadline.
fn events(
    follower: Follower,
    deadline: Option<Instant>,
    call: TaskTrackerToken,
) -> impl Stream<Item = Result<pb::ChatResponse, Status>> + Send {
    // Small: it moves with each event.
    stream::unfold(Some((Box::new(follower), call)), move |state| async move {
        let (mut follower, call) = state?;
        match until(deadline, follower.next()).await {
            Ok(None) => None,
            Ok(Some(Ok((number, event)))) => {
                Some((Ok(render_event(number, event)), Some((follower, call))))
            }
            Ok(Some(Err(error))) | Err(error) => Some((Err(error.into()), None)),
        }
    })
}

/// A checked `RewindRequest`.
struct RewindCall {
    session: SessionId,
    rewind: Rewind,
    stops_turn: bool,
}

impl RewindCall {
    fn parse(mut request: pb::RewindRequest) -> Result<Self, Error> {
        let request_id = std::mem::take(&mut request.request_id);
        let body = request.encode_to_vec();
        let request_id = id_or_new("request_id", request_id)?;
        let key = RequestKey::new("rewind", &request_id, &body);
        let stops_turn = request.stop_turn;
        let (session, rewind) = sessions::parse_rewind(request, key, now_ms())?;
        Ok(Self {
            session,
            rewind,
            stops_turn,
        })
    }
}

/// A checked `AppendRequest`.
struct AppendCall {
    session: SessionId,
    request_id: String,
    key: RequestKey,
    drafts: Vec<Draft>,
    expected_last_sequence: Option<i64>,
}

impl AppendCall {
    fn parse(mut request: pb::AppendRequest) -> Result<Self, Error> {
        let request_id = std::mem::take(&mut request.request_id);
        wire::drop_output(&mut request.messages);
        let body = request.encode_to_vec();
        let session = SessionId::parse(request.session_id)?;
        let drafts = wire::parse_messages(request.messages, BATCH_BYTES_MAX)?;
        if request
            .expected_last_sequence
            .is_some_and(|expected| expected < 0)
        {
            return Err(Violation::new("expected_last_sequence", "must be 0 or more").into());
        }
        let request_id = id_or_new("request_id", request_id)?;
        Ok(Self {
            key: RequestKey::new("append", &request_id, &body),
            session,
            request_id,
            drafts,
            expected_last_sequence: request.expected_last_sequence,
        })
    }
}

/// The client's id, or a new one.
fn id_or_new(field: &str, id: String) -> Result<String, Error> {
    check_name(field, &id, NAME_BYTES_MAX)?;
    if id.is_empty() {
        return Ok(Ulid::generate().to_string());
    }
    Ok(id)
}

fn parse_call(mut request: pb::ChatRequest) -> Result<Call, Error> {
    // What may differ when a turn is asked for again is not part of what is asked.
    let turn_id = std::mem::take(&mut request.turn_id);
    let resume_after = std::mem::take(&mut request.resume_after);
    let on_conflict = std::mem::take(&mut request.on_conflict);
    let on_disconnect = std::mem::take(&mut request.on_disconnect);
    let session = SessionId::parse(request.session_id.clone())?;
    if resume_after < 0 {
        return Err(Violation::new("resume_after", "must be 0 or more").into());
    }
    let on_conflict = match pb::OnConflict::try_from(on_conflict) {
        Ok(pb::OnConflict::Unspecified | pb::OnConflict::Reject) => OnConflict::Reject,
        Ok(pb::OnConflict::Queue) => OnConflict::Wait,
        Ok(pb::OnConflict::Supersede) => OnConflict::Supersede,
        Err(_) => return Err(Violation::new("on_conflict", "is not one of its values").into()),
    };
    if pb::OnDisconnect::try_from(on_disconnect).is_err() {
        return Err(Violation::new("on_disconnect", "is not one of its values").into());
    }
    let follows = request.messages.is_empty() && !turn_id.is_empty();
    let turn_id = id_or_new("turn_id", turn_id)?;
    wire::drop_output(&mut request.messages);
    let mut body = request.encode_to_vec();
    let key = RequestKey::new("turn", &turn_id, &body);
    // Whoever runs the turn goes by it. To decode the bytes of two messages is to merge them.
    let besides = pb::ChatRequest {
        on_disconnect,
        ..Default::default()
    };
    body.extend(besides.encode_to_vec());
    let history = match follows {
        true => Asked::default(),
        false => check_ask(request)?.history,
    };
    Ok(Call {
        session,
        key,
        turn_id,
        request: (!follows).then(|| body.into()),
        history,
        resume_after,
        on_conflict,
    })
}

/// Reads what was asked of a turn from the bytes that are kept with it: those of its `ChatRequest`.
pub fn parse_ask(request: &[u8]) -> Result<Ask, Error> {
    let request = pb::ChatRequest::decode(request);
    check_ask(request.map_err(|_| store::Error::Corrupt("the request of a turn".to_owned()))?)
}

fn check_ask(request: pb::ChatRequest) -> Result<Ask, Error> {
    let stop_on_disconnect = request.on_disconnect() == pb::OnDisconnect::Stop;
    let history = Asked::parse(
        request.last_messages,
        request.last_turns,
        request.max_tokens,
        PAGE_MESSAGES_MAX,
    )?;
    if request.system_prompt.len() > MESSAGE_BYTES_MAX {
        let rule = format!("must be at most {MESSAGE_BYTES_MAX} bytes");
        return Err(Violation::new("system_prompt", rule).into());
    }
    check_name("model", &request.model, NAME_BYTES_MAX)?;
    let drafts = wire::parse_messages(request.messages, TURN_BYTES_MAX)?;
    for (index, draft) in drafts.iter().enumerate() {
        if draft.role == Role::Assistant {
            let rule = "must not be ROLE_ASSISTANT: the answer is the model's";
            return Err(Violation::new(format!("messages[{index}].role"), rule).into());
        }
    }
    let prompt = Prompt {
        model: Some(request.model).filter(|model| !model.is_empty()),
        system: Some(request.system_prompt).filter(|system| !system.is_empty()),
        messages: Vec::new(),
        tools: wire::parse_tools(request.tools)?,
        options: wire::parse_options(request.options)?,
    };
    Ok(Ask {
        drafts,
        prompt,
        history,
        stop_on_disconnect,
    })
}

fn render_event(number: i64, event: Event) -> pb::ChatResponse {
    use pb::chat_response::Event as Shown;
    let shown = match event {
        Event::Started(started) => Shown::Started(pb::Started {
            turn_id: started.turn_id,
            model: started.model,
            history_messages: i32::try_from(started.history_messages).unwrap_or(i32::MAX),
            attempt: i32::try_from(started.attempt).unwrap_or(i32::MAX),
            history_tokens: i64::try_from(started.history_tokens).unwrap_or(i64::MAX),
            tokenizer: started.tokenizer.into_owned(),
        }),
        Event::Delta(delta) => Shown::Delta(pb::Delta {
            text: delta.text,
            reasoning: delta.reasoning,
            tool_calls: delta
                .tool_calls
                .into_iter()
                .map(|call| pb::ToolCallDelta {
                    index: i32::try_from(call.index).unwrap_or(i32::MAX),
                    id: call.id.unwrap_or_default(),
                    name: call.name.unwrap_or_default(),
                    arguments: call.arguments,
                })
                .collect(),
        }),
        Event::Completed(completed) => Shown::Completed(pb::Completed {
            messages: wire::render_stored(completed.messages),
            usage: completed.usage.map(wire::render_usage),
            finish_reason: wire::render_finish_reason(completed.finish_reason).into(),
        }),
    };
    pb::ChatResponse {
        event_number: number,
        event: Some(shown),
    }
}

/// The moment at which a caller gives up.
#[derive(Clone, Copy)]
struct Deadline(Instant);

/// Notes the caller's deadline, counted from now on. tonic has a clock of its own for a call, which
/// starts after this has been called with its head: so ours never runs out later, also where the
/// body of a request is late, and the caller gets our error. Where no body comes, it is tonic's.
pub fn note_deadline<B>(request: &mut http::Request<B>) {
    if let Some(deadline) = read_deadline(request.headers()) {
        request.extensions_mut().insert(Deadline(deadline));
    }
}

fn deadline<T>(request: &Request<T>) -> Option<Instant> {
    let noted: Option<&Deadline> = request.extensions().get();
    noted.map(|deadline| deadline.0)
}

/// The deadline from the header that gRPC sends: a number of at most eight digits and a unit.
fn read_deadline(headers: &HeaderMap) -> Option<Instant> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    let timeout = match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Instant::now().checked_add(timeout)
}

/// Waits for a turn no longer than the caller does.
async fn until<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Result<T, Error> {
    let Some(deadline) = deadline else {
        return Ok(work.await);
    };
    let outcome = timeout_at(deadline, work).await;
    // Whatever becomes of the turn, the same `turn_id` tells it.
    outcome.map_err(|_| Error::DeadlineExceeded {
        may_be_stored: true,
    })
}

/// Waits for the store no longer than the caller does. `writes`: the store may have done the work
/// although the wait was given up.
async fn within<T>(
    deadline: Option<Instant>,
    writes: bool,
    work: impl Future<Output = T>,
) -> Result<T, Error> {
    let Some(deadline) = deadline else {
        return Ok(work.await);
    };
    let outcome = timeout_at(deadline, work).await;
    outcome.map_err(|_| Error::DeadlineExceeded {
        may_be_stored: writes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_read_in_every_unit_and_nonsense_is_none() {
        let at = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            let now = Instant::now();
            read_deadline(&headers).map(|deadline| (deadline - now).as_millis())
        };
        for (text, ms) in [
            ("1H", 3_600_000),
            ("2M", 120_000),
            ("3S", 3_000),
            ("400m", 400),
        ] {
            let difference = at(text).unwrap().abs_diff(ms);
            assert!(difference < 100, "{text}");
        }
        for nonsense in ["", "S", "1", "1x", "-1S", "123456789S", "1.5S"] {
            assert_eq!(at(nonsense), None, "{nonsense}");
        }
    }
}
