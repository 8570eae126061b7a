-- Deletes all that is kept on a session but its last sequence.
--
-- ARGV: none
--
-- Returns, besides what keys.lua says:
--   { 'cleared', count }    so many elements went
--
-- Leaves {K}:session without content: the base for 30 days. For a session without any sequence,
-- only an epoch, for an hour: a turn that runs on it must not bring it to life after this.

local session, refusal = reconcile()
if not session then
  return refusal
end
for bucket = 0, 1 do
  refusal = refusal_of(redis.pcall('HLEN', REQUESTS[bucket]), REQUESTS[bucket])
  if refusal then
    return refusal
  end
end

refusal = refusal_of(redis.pcall('HLEN', TURNS), TURNS)
if refusal then
  return refusal
end

local count = session.length
-- First, since deleting is allowed when memory has run out, and then so is the rest.
redis.call('UNLINK', LIST)
session.base = session.last
session.length = 0
session.mark = ''
session.epoch = session.epoch + 1
session.expires_at = nil
session.gaps = {}
session.ttl = nil
session.is_cleared = true
save(session)
ring()
return { 'cleared', count }
