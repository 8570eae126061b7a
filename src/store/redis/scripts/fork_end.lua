-- Makes a copy a session: in one step, once.
--
-- KEYS, besides those of the new session:
--   6  the copy, a LIST
--
-- ARGV:
--   1  how many elements the copy has
--   2  the title
--   3  the metadata
--   4  the origin
--
-- Returns, besides what keys.lua says:
--   { 'seen', … }   as seen.lua says, the floor left out: it is a session now, or is one by the
--                   same call before
--   { 'exists' }    the session has elements, or a turn runs on it
--   { 'changed' }   the copy is another one, or has gone
--
-- The first write is RENAME. It needs no memory, and so the rest is allowed.

local session, refusal = reconcile()
if not session then
  return refusal
end
local turn
turn, refusal = last_turn_of(session, false)
if refusal then
  return refusal
end
local is_running = turn ~= '' and turn[4][1] == 'running'
if session.length > 0 or is_running then
  if session.length > 0 and not session.is_cleared and redis.call('HGET', SESSION, 'origin') == ARGV[4] then
    return seen(session, turn, 0)
  end
  return { 'exists' }
end
local length = redis.call('LLEN', KEYS[6])
if length ~= tonumber(ARGV[1]) then
  return { 'changed' }
end

redis.call('RENAME', KEYS[6], LIST)
redis.call('PERSIST', LIST)
session.length = length
session.last = session.last + length
session.mark = fingerprint(redis.call('LINDEX', LIST, '0'))
session.ttl = nil
session.expires_at = nil
live_on(session)
save(session)
session.is_cleared, session.has_expired = false, false
for index, name in ipairs({ 'title', 'metadata', 'origin' }) do
  if ARGV[index + 1] ~= '' then
    redis.call('HSET', SESSION, name, ARGV[index + 1])
  else
    redis.call('HDEL', SESSION, name)
  end
end
redis.call('HDEL', SESSION, 'ttl')
if ARGV[3] ~= '' then
  raise_version(session)
end
ring()
return seen(session, turn, 0)
