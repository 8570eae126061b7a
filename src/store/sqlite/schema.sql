-- Version 1 of the file. Later versions are further migrations; this text stays as it is.
--
-- Anyone may read and change the file with SQLite's own tools, also while the server runs:
--
--     sqlite3 chat-memory.db "SELECT sequence, element FROM history WHERE key = 'message_store:s'"
--
-- Sessions. A cleared one stays for a while, without contents: its sequences are not given out
-- again, and what began before the clear is refused after it.
CREATE TABLE sessions (
    -- AUTOINCREMENT: a number is not used again, so a session never meets what another left over.
    number        INTEGER PRIMARY KEY AUTOINCREMENT,
    -- The key prefix and the session id, as the key in Redis.
    key           TEXT    NOT NULL UNIQUE,
    -- The last sequence given out.
    last_sequence INTEGER NOT NULL,
    -- How often the session was cleared.
    epoch         INTEGER NOT NULL DEFAULT 0,
    -- From when on a cleared session is forgotten, in milliseconds since 1970; NULL once it has
    -- messages again.
    forget_ms     INTEGER
) STRICT;

CREATE INDEX sessions_forget ON sessions (forget_ms) WHERE forget_ms IS NOT NULL;

-- Messages, in the order of their sequences: those of one session lie side by side in the file, so
-- that reading the last 20 touches a page or two.
CREATE TABLE messages (
    session  INTEGER NOT NULL REFERENCES sessions (number),
    sequence INTEGER NOT NULL,
    -- JSON, as LangChain writes it. A BLOB, because other programs' text may not be valid UTF-8.
    element  BLOB    NOT NULL,
    PRIMARY KEY (session, sequence)
) STRICT, WITHOUT ROWID;

-- The appends of the last 24 hours, so that a repeated one is not stored twice.
CREATE TABLE requests (
    -- Rises with time: the oldest are found and deleted without an index of their own.
    number         INTEGER PRIMARY KEY,
    session        INTEGER NOT NULL REFERENCES sessions (number),
    id             BLOB    NOT NULL,
    fingerprint    BLOB    NOT NULL,
    -- What it stored.
    first_sequence INTEGER NOT NULL,
    count          INTEGER NOT NULL,
    -- When its messages were made, and until when the row counts; milliseconds since 1970.
    time_ms        INTEGER NOT NULL,
    expires_ms     INTEGER NOT NULL,
    UNIQUE (session, id)
) STRICT;

-- For people.
CREATE VIEW history AS
    SELECT sessions.key, messages.sequence, CAST(messages.element AS TEXT) AS element
    FROM messages JOIN sessions ON sessions.number = messages.session;
