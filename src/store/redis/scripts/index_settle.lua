-- Puts a session into the index under its metadata, and under no other but what others have announced.
--
-- ARGV, besides what index.lua says:
--   2  the session
--   3  the token under which they were announced; '' if they were not
--   4  its score
--   5  the version of its metadata: a later one stands. 0 if it did not get what was announced
--   6… its pairs
--
-- Returns { 'settled' }.

local session, token = ARGV[2], ARGV[3]
local left, others = '', {}
for announced in string.gmatch(redis.call('HGET', KEYS[4], session) or '', '%S+') do
  if string.match(announced, '^%x+') == token then
    left = string.match(announced, '^%x+:%d+(.*)')
  else
    others[#others + 1] = announced
  end
end
if left == '' then
  -- Nothing was announced, or this is a repetition.
elseif #others > 0 then
  redis.call('HSET', KEYS[4], session, table.concat(others, ' '))
else
  redis.call('HDEL', KEYS[4], session)
end

local known = redis.call('HGET', KEYS[3], session) or '0'
if tonumber(ARGV[5]) > tonumber(string.match(known, '^%d+')) then
  redis.call('ZADD', KEYS[1], 'GT', ARGV[4], session)
  redis.call('ZADD', KEYS[2], 0, session)
  redis.call('HSET', KEYS[3], session, table.concat(ARGV, ' ', 5))
  for index = 6, #ARGV do
    redis.call('SADD', KEY_OF_PAIR .. ARGV[index], session)
  end
  left = left .. string.match(known, '^%d+(.*)')
end
leave(session, left)
return { 'settled' }
