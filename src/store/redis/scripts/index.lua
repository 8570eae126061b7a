-- What the scripts on the index of sessions begin with.
--
-- KEYS, all in one slot:
--
--   1  {<prefix>}:sessions    ZSET  each session, with its score
--   2  {<prefix>}:names       ZSET  the same, in the order of their names
--   3  {<prefix>}:pairs       HASH  session -> the version of its metadata, and ` ` and a pair for each
--   4  {<prefix>}:announced   HASH  session -> what calls have announced that have not come to their
--                                   end: `token:time:pair,pair …`, separated by spaces
--
-- A pair is a hash of 32 hexadecimal digits. The set of a pair, {<prefix>}:pair:<hash>, has the sessions
-- under which one of the two names it: so whatever is in a set leaves it some day.
--
-- ARGV of every script:
--   1  what the names of the keys of pairs begin with

local KEY_OF_PAIR = ARGV[1]

-- Takes a session out of the sets of these pairs, but of those that it stands under still.
local function leave(session, pairs_left)
  local known = redis.call('HGET', KEYS[3], session) or ''
  local stands = known .. ' ' .. (redis.call('HGET', KEYS[4], session) or '')
  for pair in string.gmatch(pairs_left, '[ ,:](%x+)') do
    if not string.find(stands, pair, 1, true) then
      redis.call('SREM', KEY_OF_PAIR .. pair, session)
    end
  end
end
