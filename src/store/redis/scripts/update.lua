-- Changes what is said of a session.
--
-- ARGV:
--   1, 2   a fact and its value, '' for none
--   3, 4   another, and so on
--
-- Returns, besides what keys.lua says:
--   { 'seen', … }   as seen.lua says, the floor left out
--   { 'empty' }     it has no elements; nothing was changed
--
-- The first write is an HSET, which Redis refuses when it is out of memory.

local session, refusal = reconcile()
if not session then
  return refusal
end
local turn
turn, refusal = last_turn_of(session, false)
if refusal then
  return refusal
end
if session.length == 0 then
  return { 'empty' }
end

save(session)
if session.is_cleared then
  turn = ''
  session.is_cleared = false
end
for index = 1, #ARGV, 2 do
  if ARGV[index + 1] == '' then
    redis.call('HDEL', SESSION, ARGV[index])
  else
    redis.call('HSET', SESSION, ARGV[index], ARGV[index + 1])
  end
  if ARGV[index] == 'metadata' then
    raise_version(session)
  elseif ARGV[index] == 'ttl' then
    if session.ttl and ARGV[index + 1] == '' and session.expires_at then
      -- The expiry is one that we have set.
      redis.call('PERSIST', LIST)
      session.expires_at = nil
    end
    session.ttl = tonumber(ARGV[index + 1])
  end
end
live_on(session)
save(session)
ring()
return seen(session, turn, 0)
