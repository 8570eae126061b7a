-- Version 4 of the file: messages lie in the order in which they were written, and an index has those
-- of a session side by side. Many sessions that are written to then share a page of messages; before,
-- each had to change a page or two of its own, in a tree whose inner pages held whole messages.
--
-- Rewrites all messages, so it takes the longer the larger the file is, and twice its room.
DROP VIEW history;
ALTER TABLE messages RENAME TO messages_3;

CREATE TABLE messages (
    session  INTEGER NOT NULL REFERENCES sessions (number),
    sequence INTEGER NOT NULL,
    -- JSON, as LangChain writes it. A BLOB, because other programs' text may not be valid UTF-8.
    element  BLOB    NOT NULL,
    PRIMARY KEY (session, sequence)
) STRICT;

-- Without those of sessions that other programs have deleted: nobody sees them any more.
INSERT INTO messages (session, sequence, element)
    SELECT session, sequence, element FROM messages_3
    WHERE session IN (SELECT number FROM sessions) ORDER BY session, sequence;
DROP TABLE messages_3;

-- As it was.
CREATE VIEW history AS
    SELECT sessions.key, messages.sequence, CAST(messages.element AS TEXT) AS element,
        sessions.title
    FROM messages JOIN sessions ON sessions.number = messages.session
    WHERE substr(sessions.key, 1, 1) <> char(1)
        AND (sessions.expires_ms IS NULL
            OR sessions.expires_ms > 1000 * CAST(strftime('%s', 'now') AS INTEGER));
