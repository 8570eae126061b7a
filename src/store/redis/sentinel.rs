//! Finds the master that Sentinels watch over. Asked anew for each connection; knows nothing of what
//! is done with it.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, RedisConnectionInfo};
use tokio::time;
use tokio_util::task::AbortOnDropHandle;

use super::connection::{Address, dial, explain};
use super::url::{describe, parse_several};

/// Where Sentinels listen if a URL does not say.
const PORT: u16 = 26379;

/// The Sentinels of a master.
#[derive(Clone)]
pub(super) struct Sentinels {
    servers: Vec<(String, u16)>,
    master: String,
}

impl Sentinels {
    /// Reads what comes after `redis-sentinel://`: `[user:password@]host[:port][,…]/master[/db]`. The
    /// user, the password and the database are the master's; Sentinels are asked without.
    pub(super) fn parse(rest: &str) -> Result<(Self, RedisConnectionInfo), String> {
        let several = parse_several(rest, PORT)?;
        let (master, database) = match several.path.split_once('/') {
            Some((master, database)) => (master, database),
            None => (several.path.as_str(), ""),
        };
        if master.is_empty() {
            return Err("the name of the master is missing: `…/mymaster`".to_owned());
        }
        let database = match database {
            "" => 0,
            text => match text.parse() {
                Ok(number @ 0..) => number,
                _ => return Err("the database is no number".to_owned()),
            },
        };
        let sentinels = Self {
            servers: several.servers,
            master: master.to_owned(),
        };
        Ok((sentinels, several.handshake.set_db(database)))
    }

    /// Where the master is, as the first Sentinel says that can be asked and knows it.
    pub(super) async fn master(&self, limit: Duration) -> Result<(String, u16), String> {
        // One that takes a connection and says nothing must leave time for the others.
        let share = u32::try_from(self.servers.len() + 1).unwrap_or(u32::MAX);
        let limit = limit / share;
        let mut reasons = Vec::new();
        for server in &self.servers {
            let asked = time::timeout(limit, self.ask(server)).await;
            let limit_ms = limit.as_millis();
            match asked.unwrap_or_else(|_| Err(format!("no answer in {limit_ms} ms"))) {
                Ok(master) => return Ok(master),
                Err(reason) => {
                    reasons.push(format!(
                        "{}: {reason}",
                        describe(std::slice::from_ref(server))
                    ));
                }
            }
        }
        Err(format!(
            "no Sentinel knows the master: {}",
            reasons.join("; ")
        ))
    }

    async fn ask(&self, (host, port): &(String, u16)) -> Result<(String, u16), String> {
        let address = Address::Tcp {
            host: host.clone(),
            port: *port,
        };
        let stream = dial(&address).await.map_err(|error| error.to_string())?;
        let handshake = RedisConnectionInfo::default();
        let config = AsyncConnectionConfig::new();
        let (mut connection, driver) =
            MultiplexedConnection::new_with_config(&handshake, stream, config)
                .await
                .map_err(|error| explain(&error))?;
        let _driver = AbortOnDropHandle::new(tokio::spawn(driver));
        let mut command = redis::cmd("SENTINEL");
        command.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.master);
        let answer: Option<(String, u16)> = command
            .query_async(&mut connection)
            .await
            .map_err(|error| explain(&error))?;
        answer.ok_or_else(|| "watches over no such master".to_owned())
    }

    pub(super) fn describe(&self) -> String {
        format!(
            "the master {} of Sentinels at {}",
            self.master,
            describe(&self.servers)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentinels_are_read_with_the_name_and_the_database_of_their_master() {
        let (sentinels, handshake) = Sentinels::parse(":secret@a,b:7/mymaster/2").unwrap();
        assert_eq!(
            sentinels.describe(),
            "the master mymaster of Sentinels at a:26379,b:7"
        );
        assert_eq!(handshake.db(), 2);
        assert_eq!(handshake.password(), Some("secret"));
        for rest in ["a", "a/", "a/name/x", "a/name/-1", "a/name/1/2"] {
            assert!(Sentinels::parse(rest).is_err(), "{rest}");
        }
    }
}
