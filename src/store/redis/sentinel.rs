//! Finds the master that Sentinels watch over. Asked anew for each connection; knows nothing of what
//! is done with it.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, IntoConnectionInfo as _, RedisConnectionInfo};
use tokio::time;
use tokio_rustls::TlsConnector;
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
    /// The user and the password of the Sentinels themselves.
    handshake: RedisConnectionInfo,
    /// How to speak to Sentinels and master, where it is TLS.
    tls: Option<TlsConnector>,
}

impl Sentinels {
    /// Reads what comes after `redis-sentinel://`:
    /// `[user:password@]host[:port][,…]/master[/db][?sentinel_username=…&sentinel_password=…]`. The
    /// first user and password, and the database, are the master's.
    pub(super) fn parse(
        rest: &str,
        tls: Option<TlsConnector>,
    ) -> Result<(Self, RedisConnectionInfo), String> {
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
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
            handshake: parse_query(query)?,
            tls,
        };
        Ok((sentinels, several.handshake.set_db(database)))
    }

    pub(super) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Where the master is, as the first Sentinel says that can be asked and knows it.
    pub(super) async fn master(&self, limit: Duration) -> Result<Address, String> {
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

    async fn ask(&self, (host, port): &(String, u16)) -> Result<Address, String> {
        let address = Address::of(host, *port, self.tls.as_ref())?;
        let stream = dial(&address).await.map_err(|error| error.to_string())?;
        let config = AsyncConnectionConfig::new();
        let (mut connection, driver) =
            MultiplexedConnection::new_with_config(&self.handshake, stream, config)
                .await
                .map_err(|error| explain(&error))?;
        let _driver = AbortOnDropHandle::new(tokio::spawn(driver));
        let mut command = redis::cmd("SENTINEL");
        command.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.master);
        let answer: Option<(String, u16)> = command
            .query_async(&mut connection)
            .await
            .map_err(|error| explain(&error))?;
        let (host, port) = answer.ok_or("watches over no such master")?;
        Address::of(&host, port, self.tls.as_ref())
    }

    pub(super) fn describe(&self) -> String {
        format!(
            "the master {} of Sentinels at {}{}",
            self.master,
            describe(&self.servers),
            if self.is_tls() { " with TLS" } else { "" }
        )
    }
}

/// Reads the user and the password of Sentinels. Errors repeat nothing of them.
fn parse_query(query: &str) -> Result<RedisConnectionInfo, String> {
    let (mut user, mut password) = ("", "");
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("sentinel_username", value)) => user = value,
            Some(("sentinel_password", value)) => password = value,
            _ => {
                return Err("behind `?`, there may be `sentinel_username=…` and \
                            `sentinel_password=…`, joined by `&`"
                    .to_owned());
            }
        }
    }
    if user.is_empty() && password.is_empty() {
        return Ok(RedisConnectionInfo::default());
    }
    // Escapes are redis-rs' to read, as those of the master's password are.
    if [user, password].concat().contains(['/', '?', '#', '@']) || user.contains(':') {
        let reason = "`/`, `?`, `#`, `@` in a Sentinel's password are written %2F, %3F, %23, %40";
        return Err(reason.to_owned());
    }
    let info = format!("redis://{user}:{password}@sentinel").into_connection_info();
    let info = info.map_err(|error| explain(&error))?;
    Ok(info.redis_settings().clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentinels_are_read_with_the_name_and_the_database_of_their_master() {
        let (sentinels, handshake) = Sentinels::parse(":secret@a,b:7/mymaster/2", None).unwrap();
        assert_eq!(
            sentinels.describe(),
            "the master mymaster of Sentinels at a:26379,b:7"
        );
        assert_eq!(handshake.db(), 2);
        assert_eq!(handshake.password(), Some("secret"));
        assert_eq!(sentinels.handshake.password(), None);
        for rest in ["a", "a/", "a/name/x", "a/name/-1", "a/name/1/2"] {
            assert!(Sentinels::parse(rest, None).is_err(), "{rest}");
        }
    }

    #[test]
    fn sentinels_have_a_user_and_a_password_of_their_own() {
        let rest = "ann:one@a/mymaster?sentinel_username=bob&sentinel_password=t%40%2Fo+=";
        let (sentinels, handshake) = Sentinels::parse(rest, None).unwrap();
        assert_eq!(handshake.username(), Some("ann"));
        assert_eq!(handshake.password(), Some("one"));
        assert_eq!(sentinels.handshake.username(), Some("bob"));
        assert_eq!(sentinels.handshake.password(), Some("t@/o+="));
        let rest = "a/mymaster?sentinel_password=secret";
        let (sentinels, handshake) = Sentinels::parse(rest, None).unwrap();
        assert_eq!(handshake.password(), None);
        assert_eq!(sentinels.handshake.username(), None);
        assert_eq!(sentinels.handshake.password(), Some("secret"));
        for query in ["password=secret", "sentinel_password=secret@b", "secret"] {
            let error = Sentinels::parse(&format!("a/mymaster?{query}"), None);
            let error = error.err().expect(query);
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
