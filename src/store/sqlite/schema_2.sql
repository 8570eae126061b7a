-- Version 2 of the file: turns.
--
-- Turns: those that run, and for a while those that have ended.
CREATE TABLE turns (
    -- AUTOINCREMENT: a turn never meets the log that another left over.
    number         INTEGER PRIMARY KEY AUTOINCREMENT,
    session        INTEGER NOT NULL REFERENCES sessions (number),
    -- The turn's id, hashed, and for people.
    id             BLOB    NOT NULL,
    name           TEXT    NOT NULL,
    -- What was asked, hashed.
    fingerprint    BLOB    NOT NULL,
    state          TEXT    NOT NULL CHECK (state IN ('running', 'completed', 'failed')),
    -- Who has the lease, and until when, in milliseconds since 1970.
    token          BLOB    NOT NULL,
    expires_ms     INTEGER NOT NULL,
    -- Of all its life, and since it was last asked for.
    attempt        INTEGER NOT NULL,
    tries          INTEGER NOT NULL,
    -- The last number for events that is taken.
    reserved       INTEGER NOT NULL,
    -- The log: chunks from the first on and before the next.
    first_chunk    INTEGER NOT NULL,
    next_chunk     INTEGER NOT NULL,
    -- Whether it is to stop: 'keep' what there is of its answer, or 'discard' it.
    stop           TEXT    CHECK (stop IN ('keep', 'discard')),
    -- How it ended, and for a completed one which messages are its own.
    outcome        BLOB,
    first_sequence INTEGER,
    count          INTEGER,
    time_ms        INTEGER,
    -- When it is forgotten, in milliseconds since 1970.
    forget_ms      INTEGER NOT NULL,
    -- What was asked, unless the turn has completed. Last, because it may be large: the columns
    -- before it are read without it.
    request        BLOB,
    UNIQUE (session, id)
) STRICT;

CREATE INDEX turns_forget ON turns (forget_ms);
CREATE INDEX turns_running ON turns (session) WHERE state = 'running';
CREATE INDEX turns_expired ON turns (expires_ms) WHERE state = 'running';

-- The logs of turns: what was said, as lines of JSON after the number of the first.
CREATE TABLE turn_chunks (
    turn   INTEGER NOT NULL REFERENCES turns (number) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    bytes  BLOB    NOT NULL,
    PRIMARY KEY (turn, number)
) STRICT, WITHOUT ROWID;

-- Calls that wait for their turn on a session, in order, and when each last asked.
CREATE TABLE turn_line (
    session  INTEGER NOT NULL REFERENCES sessions (number) ON DELETE CASCADE,
    place    INTEGER NOT NULL,
    id       BLOB    NOT NULL,
    asked_ms INTEGER NOT NULL,
    PRIMARY KEY (session, place)
) STRICT, WITHOUT ROWID;
