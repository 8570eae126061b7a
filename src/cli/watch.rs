//! `chat-memory watch`: the messages of a session, then each further one as it comes. Goes on by
//! itself behind the last one when the connection breaks.

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
    time::Duration,
};

use serde::Serialize;
use tonic::{Code, Status, transport::Channel};

use super::{
    Error,
    args::WatchArgs,
    chat::Screen,
    client::{self, Pauses},
    exit_code,
    history::{self, JsonMessage},
    sessions::JsonTurn,
    text::{self, Style},
};
use crate::pb::{
    Cleared, GetSessionRequest, Turn, TurnState, WatchRequest, WatchResponse,
    chat_memory_client::ChatMemoryClient, watch_response::Event,
};

/// Tries in a row to go on, and the longest pause between two: together most of a minute, in which a
/// server starts anew.
const TRIES_MAX: u32 = 10;
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Prints a session, and what comes, on stdout.
pub async fn run(args: WatchArgs) -> ExitCode {
    let is_terminal = io::stdout().is_terminal();
    let screen = if is_terminal && !args.json {
        let style = Style {
            color: args.color.allowed(),
        };
        Screen::terminal(io::stdout(), io::stderr(), style)
    } else {
        Screen::piped(io::stdout(), io::stderr())
    };
    // Ctrl-C ends the program as it ends any other.
    exit_code(print(&args, screen).await.map(|()| ExitCode::SUCCESS))
}

/// Prints a session, and what comes, on a screen. Ends only with an error.
pub async fn print(args: &WatchArgs, screen: Screen) -> Result<(), Error> {
    let mut client = client::connect_api(&args.target.target).await?;
    let after = match args.new {
        true => last_sequence(&mut client, args).await?,
        false => args.after,
    };
    let mut watcher = Watcher {
        screen,
        json: args.json,
        after,
        resumed_after: None,
    };
    let mut pauses = Pauses::new(TRIES_MAX, PAUSE_MAX);
    loop {
        let request = WatchRequest {
            session_id: args.session.session.as_str().to_owned(),
            after_sequence: watcher.after,
            include_raw: false,
        };
        let status = match watcher.follow(&mut client, request, &mut pauses).await? {
            End::Broken(status) => status,
            End::OtherSession => continue,
        };
        let Some(pause) = pauses.next(&status).filter(|_| may_go_on(&status)) else {
            return Err(status.into());
        };
        let broken = client::describe(&status);
        watcher.screen.notice(&format!(
            "{broken}\ngoing on after number {} in {:.1} s",
            watcher.after,
            pause.as_secs_f64()
        ))?;
        tokio::time::sleep(pause).await;
        watcher.resumed_after = Some(watcher.after);
    }
}

/// The last sequence that the session has given out; 0 where there is no session yet.
async fn last_sequence(
    client: &mut ChatMemoryClient<Channel>,
    args: &WatchArgs,
) -> Result<i64, Error> {
    let request = client::request(GetSessionRequest {
        session_id: args.session.session.as_str().to_owned(),
    });
    match client.get_session(request).await {
        Ok(answer) => {
            let session = answer.into_inner().session;
            Ok(session.map_or(0, |session| session.last_sequence))
        }
        Err(status) if status.code() == Code::NotFound => Ok(0),
        Err(status) => Err(status.into()),
    }
}

/// Whether a new call may go on where one that ended so was.
fn may_go_on(status: &Status) -> bool {
    client::is_broken(status) || client::reason(status).as_deref() == Some("WATCHER_TOO_SLOW")
}

/// How a call ended.
enum End {
    Broken(Status),
    /// The session is not the one that was watched before: all of it is new.
    OtherSession,
}

struct Watcher {
    screen: Screen,
    json: bool,
    /// The sequence up to which all has been printed.
    after: i64,
    /// Where the call went on, if it is not the first and has not caught up yet.
    resumed_after: Option<i64>,
}

impl Watcher {
    /// Prints what one call gives, until it ends.
    async fn follow(
        &mut self,
        client: &mut ChatMemoryClient<Channel>,
        request: WatchRequest,
        pauses: &mut Pauses,
    ) -> Result<End, Error> {
        let mut events = match client.watch(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return Ok(End::Broken(status)),
        };
        loop {
            match events.message().await {
                Ok(Some(WatchResponse { event: Some(event) })) => {
                    pauses.restart();
                    if self.is_other_session(&event) {
                        self.take(Event::Cleared(Cleared {}))?;
                        return Ok(End::OtherSession);
                    }
                    self.take(event)?;
                }
                // An event that this program does not know is for others.
                Ok(Some(WatchResponse { event: None })) => {}
                Ok(None) => {
                    let status = Status::unavailable("the server has ended the stream");
                    return Ok(End::Broken(status));
                }
                Err(status) => return Ok(End::Broken(status)),
            }
        }
    }

    /// Whether the session has expired and begun anew while nobody watched it. Its last number never
    /// falls otherwise.
    fn is_other_session(&mut self, event: &Event) -> bool {
        let Event::Live(live) = event else {
            return false;
        };
        let resumed_after = self.resumed_after.take();
        resumed_after.is_some_and(|after| live.last_sequence < after)
    }

    fn take(&mut self, event: Event) -> Result<(), Error> {
        self.print(&event)?;
        self.after = match event {
            Event::Message(message) => message.sequence,
            Event::Live(live) => live.last_sequence,
            Event::Rewound(rewound) => rewound.last_sequence,
            Event::Skipped(skipped) => skipped.first_sequence - 1,
            // The next life of a session may count from 1 on.
            Event::Cleared(_) => 0,
            Event::Turn(_) => self.after,
        };
        Ok(())
    }

    fn print(&mut self, event: &Event) -> io::Result<()> {
        let mut shown = Vec::new();
        if self.json {
            history::write_line(&mut shown, &JsonEvent::from(event))?;
            return self.screen.bytes(&shown);
        }
        let notice = match event {
            Event::Message(message) => {
                history::write_message(&mut shown, message, self.screen.style())?;
                return self.screen.bytes(&shown);
            }
            Event::Live(live) if live.last_sequence == 0 => "[no message yet]".to_owned(),
            Event::Live(live) => {
                format!("[up to number {}; what comes is new]", live.last_sequence)
            }
            Event::Turn(turn) => turn_notice(turn),
            Event::Rewound(rewound) => {
                let last = rewound.last_sequence;
                format!("[rewound: what came after number {last} is deleted]")
            }
            Event::Cleared(_) => "[cleared: the session begins anew]".to_owned(),
            Event::Skipped(skipped) => {
                let first = skipped.first_sequence;
                format!("[skipped: messages before number {first} are gone]")
            }
        };
        self.screen.remark(&notice)
    }
}

fn turn_notice(turn: &Turn) -> String {
    let id = text::one_line(&turn.turn_id);
    match turn.state() {
        TurnState::Running if turn.attempt > 1 => {
            format!("[turn {id} begins anew, attempt {}]", turn.attempt)
        }
        TurnState::Running => format!("[turn {id} begins]"),
        TurnState::Completed => format!("[turn {id} is stored]"),
        TurnState::Failed => {
            let reason = text::one_line(&turn.reason);
            let error = text::one_line(&turn.error);
            format!("[turn {id} failed: {reason}: {error}]")
        }
        TurnState::Unspecified => format!("[turn {id}: state {}]", turn.state),
    }
}

/// An event in the API's JSON form.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum JsonEvent<'a> {
    Message(Box<JsonMessage<'a>>),
    Live { last_sequence: i64 },
    Turn(Box<JsonTurn<'a>>),
    Rewound { last_sequence: i64 },
    Cleared {},
    Skipped { first_sequence: i64 },
}

impl<'a> From<&'a Event> for JsonEvent<'a> {
    fn from(event: &'a Event) -> Self {
        match event {
            Event::Message(message) => Self::Message(Box::new(message.into())),
            Event::Live(live) => Self::Live {
                last_sequence: live.last_sequence,
            },
            Event::Turn(turn) => Self::Turn(Box::new(turn.into())),
            Event::Rewound(rewound) => Self::Rewound {
                last_sequence: rewound.last_sequence,
            },
            Event::Cleared(_) => Self::Cleared {},
            Event::Skipped(skipped) => Self::Skipped {
                first_sequence: skipped.first_sequence,
            },
        }
    }
}
