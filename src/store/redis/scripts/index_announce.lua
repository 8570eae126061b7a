-- Puts a session under pairs that it is about to get, besides those that it stands under.
--
-- ARGV, besides what index.lua says:
--   2  the session
--   3  the token of the call
--   4  the time, in ms
--   5… the pairs
--
-- Returns { 'announced' }: now or by an earlier call.

local session, token = ARGV[2], ARGV[3]
local open = redis.call('HGET', KEYS[4], session)
if open and string.find(open, token, 1, true) then
  return { 'announced' }
end
open = open and open .. ' ' or ''
local announced = token .. ':' .. ARGV[4] .. ':' .. table.concat(ARGV, ',', 5)
redis.call('HSET', KEYS[4], session, open .. announced)
for index = 5, #ARGV do
  redis.call('SADD', KEY_OF_PAIR .. ARGV[index], session)
end
return { 'announced' }
