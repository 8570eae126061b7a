-- Takes sessions that have gone out of the index, unless they have been written to since.
--
-- KEYS: {<prefix>}:sessions, :names, :pairs
-- ARGV:
--   1     what the names of the keys of pairs begin with
--   2, 3  a session, and the score that it had when it was found to be gone
--   4, 5  another, and so on

for index = 2, #ARGV, 2 do
  local session = ARGV[index]
  local score = redis.call('ZSCORE', KEYS[1], session)
  if score and tonumber(score) == tonumber(ARGV[index + 1]) then
    redis.call('ZREM', KEYS[1], session)
    redis.call('ZREM', KEYS[2], session)
    local pairs_of = redis.call('HGET', KEYS[3], session)
    for pair in string.gmatch(pairs_of or '', ' (%x+)') do
      redis.call('SREM', ARGV[1] .. pair, session)
    end
    redis.call('HDEL', KEYS[3], session)
  end
end
return { 'forgotten' }
