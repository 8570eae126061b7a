//! Takes URLs apart that name several servers; each of them is then read as redis-rs reads one.
//! Connects to nothing.

use redis::{ConnectionAddr, IntoConnectionInfo as _, RedisConnectionInfo};

use super::connection::explain;

/// Servers at most: more are a mistake.
const SERVERS_MAX: usize = 1_000;

/// What a URL such as `scheme://[user:password@]host:port[,host:port…][/path]` names.
pub(super) struct Several {
    /// Host and port of each server, in order.
    pub(super) servers: Vec<(String, u16)>,
    /// The user, the password; database 0.
    pub(super) handshake: RedisConnectionInfo,
    /// What comes after the servers, without the slash.
    pub(super) path: String,
}

/// Reads what comes after `scheme://`. Errors repeat nothing of it: there may be a password in it.
pub(super) fn parse_several(rest: &str, default_port: u16) -> Result<Several, String> {
    if rest.contains(['?', '#']) {
        return Err("`?` and `#` mean nothing in a URL of several servers".to_owned());
    }
    // A password may hold commas, but no `@` and no slash: those are written %40 and %2F.
    let (user, rest) = match rest.rsplit_once('@') {
        Some((user, rest)) => (format!("{user}@"), rest),
        None => (String::new(), rest),
    };
    let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut several = Several {
        servers: Vec::new(),
        handshake: RedisConnectionInfo::default(),
        path: path.to_owned(),
    };
    for host in hosts.split(',') {
        let is_with_port = host.rsplit(']').next().is_some_and(|end| end.contains(':'));
        let port = match is_with_port {
            true => String::new(),
            false => format!(":{default_port}"),
        };
        let info = format!("redis://{user}{host}{port}").into_connection_info();
        let info = info.map_err(|error| explain(&error))?;
        let ConnectionAddr::Tcp(host, port) = info.addr() else {
            return Err("is none of a server".to_owned());
        };
        several.servers.push((host.clone(), *port));
        several.handshake = info.redis_settings().clone();
    }
    if several.servers.len() > SERVERS_MAX {
        return Err(format!("more than {SERVERS_MAX} servers"));
    }
    Ok(several)
}

/// Servers as people write them.
pub(super) fn describe(servers: &[(String, u16)]) -> String {
    let places: Vec<String> = servers
        .iter()
        .map(|(host, port)| format!("{host}:{port}"))
        .collect();
    places.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_servers_share_one_user_and_have_ports_of_their_own() {
        let several = parse_several("ann:p%40,s%2Fs@a:7000,b,[::1]:7002,[::2]/name/3", 26379);
        let several = several.unwrap();
        assert_eq!(
            describe(&several.servers),
            "a:7000,b:26379,::1:7002,::2:26379"
        );
        assert_eq!(several.handshake.username(), Some("ann"));
        assert_eq!(several.handshake.password(), Some("p@,s/s"));
        assert_eq!(several.path, "name/3");
    }

    #[test]
    fn servers_that_make_no_sense_are_refused_without_repeating_them() {
        for rest in ["", "a,", ":secret@a:x", ":secret@a,b?x=secret", ":secret@"] {
            let error = parse_several(rest, 6379).err().expect(rest);
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
