//! A script and what it is given. [`redis::Script`] has the same, and keeps each key and argument by
//! itself first; here they are written once, into the command that is sent.

use redis::aio::ConnectionLike;
use redis::{Cmd, ErrorKind, Pipeline, RedisResult, Script, ServerErrorKind, ToRedisArgs, Value};

/// Bytes that most invocations fit into, besides what is stored.
const USUAL_BYTES: usize = 1_024;
/// Keys and arguments of most.
const USUAL_COUNT: usize = 16;

/// A call of a script by its hash.
pub(super) struct Invocation<'a> {
    script: &'a Script,
    command: Cmd,
}

impl<'a> Invocation<'a> {
    pub(super) fn new<K: AsRef<str>>(script: &'a Script, keys: &[K]) -> Self {
        let mut command = Cmd::with_capacity(USUAL_COUNT, USUAL_BYTES);
        command.arg("EVALSHA").arg(script.get_hash());
        command.arg(keys.len());
        for key in keys {
            command.arg(key.as_ref());
        }
        Self { script, command }
    }

    /// Adds an argument.
    pub(super) fn arg(&mut self, argument: impl ToRedisArgs) -> &mut Self {
        self.command.arg(argument);
        self
    }

    /// The command, for where it is sent beside others. Redis may not have the script.
    pub(super) fn command(&self) -> &Cmd {
        &self.command
    }

    /// Runs the script. Where Redis does not have it, loads it first: NOSCRIPT means that nothing was
    /// run, so that running it again after that is safe.
    pub(super) async fn run(&self, connection: &mut impl ConnectionLike) -> RedisResult<Value> {
        match self.command.query_async(connection).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let script = self.script.prepare_invoke();
                script.load_async(connection).await?;
                self.command.query_async(connection).await
            }
            answer => answer,
        }
    }
}

/// The commands that call a script once for each of these keys and arguments.
pub(super) fn for_each(script: &Script, calls: &[(Vec<&str>, [&str; 2])]) -> Pipeline {
    let mut commands = redis::pipe();
    for (keys, arguments) in calls {
        let mut call = Invocation::new(script, keys);
        call.arg(arguments);
        commands.add_command(call.command);
    }
    commands
}
