-- Version 3 of the file: what is kept of sessions besides their messages. Adds columns and indexes
-- and rewrites nothing: a large file is brought to it in the time that a walk over its sessions takes.
--
-- When the session was last written to, in milliseconds since 1970; 0 if that is not known.
ALTER TABLE sessions ADD COLUMN active_ms INTEGER NOT NULL DEFAULT 0;
-- When it is gone by itself, in milliseconds since 1970; NULL if it is not. It reads as one that
-- never was from then on, and is deleted in steps.
ALTER TABLE sessions ADD COLUMN expires_ms INTEGER;
-- How long it lives after a write, in milliseconds: 0 for ever, NULL as the server's settings say.
ALTER TABLE sessions ADD COLUMN ttl_ms INTEGER;
ALTER TABLE sessions ADD COLUMN title TEXT;
-- Pairs by which it can be found: a JSON object of strings.
ALTER TABLE sessions ADD COLUMN metadata TEXT;
-- The key of the session that it was copied from, the last sequence copied, and up to where it was
-- to be copied (NULL: all).
ALTER TABLE sessions ADD COLUMN origin TEXT;
ALTER TABLE sessions ADD COLUMN origin_sequence INTEGER;
ALTER TABLE sessions ADD COLUMN origin_through INTEGER;
-- How many messages it has; NULL: each sequence from the oldest message to the newest has one, as it
-- is unless messages were rewound. Who deletes others by hand may set it.
ALTER TABLE sessions ADD COLUMN count INTEGER;

-- The pairs of `metadata` again, to find sessions by them, and `active_ms` to have those in order.
CREATE TABLE session_pairs (
    session   INTEGER NOT NULL REFERENCES sessions (number) ON DELETE CASCADE,
    name      TEXT    NOT NULL,
    value     TEXT    NOT NULL,
    active_ms INTEGER NOT NULL,
    PRIMARY KEY (session, name)
) STRICT, WITHOUT ROWID;

-- What is known of older sessions: a request counts for 24 hours after it was stored.
UPDATE sessions SET active_ms = max(
    coalesce((SELECT max(expires_ms) - 86400000 FROM requests WHERE session = sessions.number), 0),
    coalesce((SELECT max(time_ms) FROM turns WHERE session = sessions.number), 0))
WHERE number IN (SELECT session FROM requests)
    OR number IN (SELECT session FROM turns WHERE time_ms IS NOT NULL);

CREATE INDEX session_pairs_active ON session_pairs (name, value, active_ms, session);
-- Those that have messages.
CREATE INDEX sessions_active ON sessions (active_ms, number) WHERE forget_ms IS NULL;
CREATE INDEX sessions_expires ON sessions (expires_ms) WHERE expires_ms IS NOT NULL;
CREATE INDEX turns_latest ON turns (session, forget_ms);

-- For people. Keys that begin with a control character are those of rows that nobody sees: parts of
-- sessions that have expired, and forks that are not whole yet.
DROP VIEW history;
CREATE VIEW history AS
    SELECT sessions.key, messages.sequence, CAST(messages.element AS TEXT) AS element,
        sessions.title
    FROM messages JOIN sessions ON sessions.number = messages.session
    WHERE substr(sessions.key, 1, 1) <> char(1)
        AND (sessions.expires_ms IS NULL
            OR sessions.expires_ms > 1000 * CAST(strftime('%s', 'now') AS INTEGER));
