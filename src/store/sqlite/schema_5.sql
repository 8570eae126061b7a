-- Version 5 of the file: nothing checks any more that a message and a request have a session. The check
-- looked for the session's row at each append, which has just read it. Sessions' numbers are not used
-- again, so what a deleted one left would be nobody's.
--
-- Changes what the file says of two tables, and nothing in them, as SQLite describes it for removing a
-- constraint (https://www.sqlite.org/lang_altertable.html#otheralter).
PRAGMA writable_schema = ON;
UPDATE sqlite_schema SET sql = replace(sql, ' REFERENCES sessions (number)', '')
WHERE type = 'table' AND name IN ('messages', 'requests');
-- Off, and read anew.
PRAGMA writable_schema = RESET;
