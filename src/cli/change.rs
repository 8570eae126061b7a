//! `chat-memory update`, `rewind` and `fork`: changes to a session as a whole.

use std::{
    io::{self, IsTerminal as _, Write},
    process::ExitCode,
    time::Duration,
};

use prost_types::FieldMask;
use tonic::transport::Channel;
use ulid::Ulid;

use super::{
    Error,
    args::{ForkArgs, RewindArgs, Ttl, UpdateArgs},
    chat::{Lines, messages},
    client, exit_code,
    history::{self, Pages},
    sessions::{Look, Table, pairs},
    text,
};
use crate::pb::{
    ForkRequest, GetMessagesRequest, GetSessionRequest, RewindRequest, Session,
    UpdateSessionRequest, chat_memory_client::ChatMemoryClient,
};

/// How long a copy may take: the server copies a large session in many steps.
const FORK_TIMEOUT: Duration = Duration::from_secs(600);

/// Changes what is said of a session, and prints it as it is then.
pub async fn update(args: UpdateArgs) -> ExitCode {
    let look = Look::of_stdout(&args.color);
    exit_code(update_on(&args, look, &mut io::stdout()).await)
}

/// As [`update`], on `out`.
pub async fn update_on(
    args: &UpdateArgs,
    look: Look,
    out: &mut impl Write,
) -> Result<ExitCode, Error> {
    let mut client = client::connect_api(&args.target.target).await?;
    let has_metadata = args.clear_metadata || !args.metadata.is_empty();
    let fields = [
        ("title", args.title.is_some()),
        ("metadata", has_metadata),
        ("ttl", args.ttl.is_some()),
    ];
    let paths = fields.into_iter().filter(|(_, is_given)| *is_given);
    let ttl = args.ttl.and_then(|ttl| match ttl {
        Ttl::Default => None,
        Ttl::Never => Some(Duration::ZERO),
        Ttl::For(time) => Some(time),
    });
    let request = UpdateSessionRequest {
        session: Some(Session {
            session_id: args.session.session.as_str().to_owned(),
            title: args.title.clone().unwrap_or_default(),
            metadata: pairs(&args.metadata),
            // What the API's type cannot hold is far more than the server allows.
            ttl: ttl.map(|time| prost_types::Duration {
                seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
                nanos: time.subsec_nanos() as i32,
            }),
            ..Session::default()
        }),
        update_mask: Some(FieldMask {
            paths: paths.map(|(path, _)| path.to_owned()).collect(),
        }),
    };
    let answer = client.update_session(client::request(request)).await?;
    let session = answer.into_inner().session;
    let session = session.ok_or(Error::Contract("an answer holds no session"))?;
    Table::new(look).write(out, &[session])?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Deletes the messages after a sequence; asks first if there is somebody to ask.
pub async fn rewind(args: RewindArgs) -> ExitCode {
    let is_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let lines = match is_terminal {
        true => Lines::edited().map(Some),
        false => Ok(None),
    };
    exit_code(match lines {
        Ok(lines) => rewind_on(&args, lines, &mut io::stdout()).await,
        Err(error) => Err(error),
    })
}

/// As [`rewind`], on `out`, with answers out of `lines` where somebody can be asked.
pub async fn rewind_on(
    args: &RewindArgs,
    lines: Option<Lines>,
    out: &mut impl Write,
) -> Result<ExitCode, Error> {
    let mut client = client::connect_api(&args.target.target).await?;
    let session_id = args.session.session.as_str();
    // What somebody agreed to is what was there then.
    let mut expected_last_sequence = None;
    if !args.yes {
        let (count, last_sequence) = count_after(&mut client, args).await?;
        expected_last_sequence = Some(last_sequence);
        if count == 0 && !args.stop_turn {
            writeln!(out, "there is no message after number {}", args.after)?;
            return Ok(ExitCode::SUCCESS);
        }
        let what = format!(
            "{} of the session {} after number {}",
            messages(count),
            text::one_line(session_id),
            args.after
        );
        let Some(mut lines) = lines else {
            return Err(Error::Unasked { what });
        };
        if !lines.confirm(&format!("delete {what}? [y/N] ")).await? {
            writeln!(out, "nothing was deleted")?;
            return Ok(ExitCode::FAILURE);
        }
    }
    let request = client::request(RewindRequest {
        session_id: session_id.to_owned(),
        after_sequence: Some(args.after),
        request_id: Ulid::generate().to_string(),
        stop_turn: args.stop_turn,
        expected_last_sequence,
    });
    let deleted = client.rewind(request).await?.into_inner().deleted_count;
    writeln!(out, "{} deleted", messages(deleted))?;
    Ok(ExitCode::SUCCESS)
}

/// How many messages a rewind would delete, and the session's last sequence.
async fn count_after(
    client: &mut ChatMemoryClient<Channel>,
    args: &RewindArgs,
) -> Result<(i64, i64), Error> {
    let request = client::request(GetSessionRequest {
        session_id: args.session.session.as_str().to_owned(),
    });
    let session = client.get_session(request).await?.into_inner().session;
    let session = session.ok_or(Error::Contract("an answer holds no session"))?;
    let (first, last) = (session.first_sequence, session.last_sequence);
    if session.message_count == 0 || last <= args.after {
        return Ok((0, last));
    }
    let before = args.after.max(first - 1);
    if last - first + 1 == session.message_count {
        return Ok((last - before, last));
    }
    // Earlier rewinds have left gaps between the numbers: only counting tells.
    let mut pages = Pages::new(
        client.clone(),
        GetMessagesRequest {
            after_sequence: Some(before),
            ..history::request(&args.session.session)
        },
    );
    let mut count = 0;
    while let Some(page) = pages.next().await? {
        count += page.len() as i64;
    }
    Ok((count, last))
}

/// Copies a session into a new one.
pub async fn fork(args: ForkArgs) -> ExitCode {
    exit_code(fork_on(&args, &mut io::stdout()).await)
}

/// As [`fork`], on `out`.
pub async fn fork_on(args: &ForkArgs, out: &mut impl Write) -> Result<ExitCode, Error> {
    let mut client = client::connect_api(&args.target.target).await?;
    let mut request = tonic::Request::new(ForkRequest {
        session_id: args.session.session.as_str().to_owned(),
        new_session_id: args.to.as_str().to_owned(),
        through_sequence: args.through,
    });
    request.set_timeout(FORK_TIMEOUT);
    let session = client.fork(request).await?.into_inner().session;
    let count = session.map_or(0, |session| session.message_count);
    let to = text::one_line(args.to.as_str());
    writeln!(out, "the session {to} has {} now", messages(count))?;
    Ok(ExitCode::SUCCESS)
}
