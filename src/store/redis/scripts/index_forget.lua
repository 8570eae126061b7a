-- Takes sessions that have gone out of the index, unless they have been written to since.
--
-- ARGV, besides what index.lua says:
--   2, 3  a session, and the score that it had when it was found to be gone
--   4, 5  another, and so on
--
-- Returns { 'forgotten' }.

for index = 2, #ARGV, 2 do
  local session = ARGV[index]
  local score = redis.call('ZSCORE', KEYS[1], session)
  if score and tonumber(score) == tonumber(ARGV[index + 1]) then
    redis.call('ZREM', KEYS[1], session)
    redis.call('ZREM', KEYS[2], session)
    local known = redis.call('HGET', KEYS[3], session) or '0'
    redis.call('HDEL', KEYS[3], session)
    leave(session, string.match(known, '^%d+(.*)'))
  end
end
return { 'forgotten' }
