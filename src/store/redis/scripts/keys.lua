-- What every script on a session begins with, after the limits, which Rust defines
-- (`REQUEST_MEMORY_MS`, `TOMBSTONE_MS`, `LINGER_MS`; of the settings `TTL_MS` and `ELEMENTS_MAX`, nil
-- if there are none, and `READS_EXTEND`). Then come common.lua and the script.
--
-- KEYS of every script, all in one slot (K is `<prefix><session_id>`):
--
--   1  K                LIST  the elements. Index 0 is the newest. LangChain's key: it may have
--                             been changed or deleted by others since we last looked.
--   2  {K}:session      HASH  the facts, below
--   3  {K}:requests:0   HASH  request id (the first 8 bytes of its hash) -> record, of even days
--   4  {K}:requests:1   HASH  the same, of odd days
--   5  {K}:turns        HASH  turns: turns.lua says what is in it
--
-- Facts (decimal numbers):
--
--   base        what the place of the oldest element is above 1: place = base + distance from the
--               tail, which is 1 for the oldest and LLEN for the newest
--   last        the last sequence given out, by a write or by a read
--   mark        what the newest element that we know of is known by: an id that is in it, `cm_…`, or
--               else its fingerprint; '' if we know of none
--   epoch       how often the session was cleared, by us or by others
--   expires_at  when the list expires, in ms since 1970; '' if it does not
--
-- and, absent unless there is something to say:
--
--   gaps        where elements were rewound (MessagePack): place, extra, place, extra …, both
--               rising. The sequence of an element is its place, and the extra of the last pair
--               whose place is smaller. All places in it are above base
--   day         there while the session has no gaps, no expiry and no time to live: the day of the
--               newest record, and `+` if the day before may have records
--   ttl         how long the session lives after its last write, in ms; 0 for ever
--   title, metadata, origin   what is said of the session; scripts do not look into it
--
-- Record: fingerprint (its first 4 bytes), the caller's time (6 bytes, big-endian), the first sequence
-- (decimal) and, if it is not 1, `:` and the count. Small, since there is one for each write. 8 bytes
-- of the id tell a million requests of a day apart, but for one session in ten million, and there a
-- request is refused as one that was used: a message would be lost only if both hashes were the same.
-- It is remembered until the end of the following day: 24 to 49 hours. Days are UTC.
--
-- Redis' own clock (TIME) is the one used here: it is the one that expires keys, and all replicas of
-- the server share it. Only the plain case of an append goes by the server's day: records stay an hour
-- longer, so that a clock which is late by less does no harm.
--
-- Every script returns a table that begins with a word, but append.lua, when it has stored, a number.
-- These come from all of them, and mean that nothing was written:
--
--   { 'wrong type', key }   the key holds something else
--   { 'corrupt', key }      the facts make no sense

local LIST, SESSION, TURNS = KEYS[1], KEYS[2], KEYS[5]

-- Looks at 288 bytes at most, since this is what a write costs most: at those that differ from one
-- element to the next. LangChain's begin alike, with 36 to 39 bytes up to the content, and end alike,
-- with about 110 bytes after it, or with an id among them. No bytes of an element are kept: the facts
-- may outlive the list.
local function fingerprint(element)
  local parts = #element .. ':' .. string.sub(element, 33, 160) .. string.sub(element, -160)
  return string.sub(redis.sha1hex(parts), 1, 16)
end

-- Whether an element, if there is one, is known by this mark, which is not ''.
local function has_mark(element, mark)
  if string.sub(mark, 1, 3) == 'cm_' then
    return element and string.find(element, mark, 1, true) ~= nil
  end
  return element and fingerprint(element) == mark
end
