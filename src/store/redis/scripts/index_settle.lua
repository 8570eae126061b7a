-- Puts a session into the index under its metadata, and under no other.
--
-- KEYS: {<prefix>}:sessions, :names, :pairs
-- ARGV:
--   1  what the names of the keys of pairs begin with
--   2  the session
--   3  its score
--   4  the version of its metadata: a later one stands
--   5… its pairs, hashed

local KEY_OF_PAIR, session, version = ARGV[1], ARGV[2], tonumber(ARGV[4])
redis.call('ZADD', KEYS[1], 'GT', ARGV[3], session)
redis.call('ZADD', KEYS[2], 0, session)
local old = redis.call('HGET', KEYS[3], session)
if old then
  if tonumber(string.match(old, '^%d+')) >= version then
    return { 'settled' }
  end
  for pair in string.gmatch(old, ' (%x+)') do
    redis.call('SREM', KEY_OF_PAIR .. pair, session)
  end
end
local new = { ARGV[4] }
for index = 5, #ARGV do
  redis.call('SADD', KEY_OF_PAIR .. ARGV[index], session)
  new[#new + 1] = ARGV[index]
end
if #new > 1 then
  redis.call('HSET', KEYS[3], session, table.concat(new, ' '))
else
  redis.call('HDEL', KEYS[3], session)
end
return { 'settled' }
