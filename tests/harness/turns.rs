//! Short ways to begin, keep and end turns.

use bytes::Bytes;
use chat_memory::store::RequestKey;
use chat_memory::store::turns::{
    BeginTurn, Begun, EndTurn, FollowTurn, KeepTurn, Lease, Leased, TakeTurn, Token, TurnId,
};

/// Longer than any test.
pub const LONG_MS: i64 = 600_000;

/// A lease of its own, which lasts.
pub fn lease() -> Lease {
    Lease {
        token: Token::new(),
        lease_ms: LONG_MS,
        retention_ms: LONG_MS,
        reserve: 100,
    }
}

/// A lease of its own, which runs out at once.
pub fn brief_lease() -> Lease {
    Lease {
        lease_ms: 1,
        ..lease()
    }
}

pub fn begin(id: &str, lease: Lease) -> BeginTurn {
    BeginTurn {
        key: RequestKey::new("turn", id, b""),
        name: id.to_owned(),
        request: Bytes::from(format!("request of {id}")),
        lease,
        waits: false,
    }
}

pub fn take(turn: TurnId, lease: Lease) -> TakeTurn {
    TakeTurn {
        turn,
        lease,
        by_force: false,
        tries_max: 3,
        outcome: Bytes::from_static(b"given up"),
    }
}

pub fn keep(turn: TurnId, lease: Lease) -> KeepTurn {
    KeepTurn {
        turn,
        lease,
        chunk: None,
        last_event: 0,
    }
}

/// The end of a turn that stores these; of a failed one if there are none.
pub fn end(turn: TurnId, token: Token, elements: &[&'static str]) -> EndTurn {
    EndTurn {
        turn,
        token,
        retention_ms: LONG_MS,
        chunk: None,
        elements: elements.iter().map(|text| Bytes::from(*text)).collect(),
        time_ms: 1_763_910_000_000,
        outcome: Bytes::from_static(b"outcome"),
    }
}

pub fn follow(turn: TurnId) -> FollowTurn {
    FollowTurn {
        turn,
        from_chunk: 0,
        bytes_max: usize::MAX,
        is_noted: false,
    }
}

pub fn leased(begun: Begun) -> Leased {
    match begun {
        Begun::Leased(leased) => leased,
        other => panic!("no lease: {other:?}"),
    }
}
