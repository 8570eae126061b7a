-- What must be known of a session to make a page of its newest elements, which another command of the
-- same transaction reads: Lua would copy each of them twice, and hash all its bytes.
--
-- KEYS: the list and the facts, as keys.lua says
--
-- ARGV:
--   1  the caller's time, in ms
--
-- Returns { last, epoch, length } if nobody else has touched the session since its last element and
-- it has no gaps; else nothing: then read.lua must find out. Writes nothing.

local facts = redis.pcall('HMGET', KEYS[2], 'mark', 'last', 'base', 'gaps', 'expires_at', 'epoch')
local last, base = tonumber(facts[2] or ''), tonumber(facts[3] or '')
if not last or not base or facts[4] or not tonumber(facts[6] or '')
  or string.sub(facts[1] or '', 1, 3) ~= 'cm_'
then
  return nil
end
local length = redis.pcall('LLEN', KEYS[1])
if length ~= last - base
  or not string.find(redis.call('LINDEX', KEYS[1], '0') or '', facts[1], 1, true)
then
  return nil
end
local left = redis.call('PTTL', KEYS[1])
local expires_at = tonumber(facts[5] or '')
local is_kept = expires_at and left >= 0 and math.abs(ARGV[1] + left - expires_at) <= 1000
if left ~= -1 and not is_kept or left == -1 and expires_at then
  return nil
end
return { last, tonumber(facts[6]), length }
