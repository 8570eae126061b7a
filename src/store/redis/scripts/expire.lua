-- Lets a session that has no expiry expire at a time.
--
-- ARGV:
--   1  the time, in ms since 1970
--
-- Returns, besides what keys.lua says:
--   { 'expires', 1 }    it does so now
--   { 'expires', 0 }    there is no list, or it had another expiry, which stands

local session, refusal = reconcile()
if not session then
  return refusal
end
local at = tonumber(ARGV[1])
if session.length == 0 or session.expires_at then
  -- A repetition of a call whose answer was lost finds its own expiry, give or take the clock.
  local is_own = session.expires_at and math.abs(session.expires_at - at) <= 1000
  return { 'expires', is_own and 1 or 0 }
end
redis.call('PEXPIREAT', LIST, ARGV[1])
session.expires_at = at
save(session)
ring()
return { 'expires', 1 }
