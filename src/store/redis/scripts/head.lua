-- What must be known of a session to make a page of its newest elements, which another command of the
-- same transaction reads: Lua would copy each of them twice, and hash all its bytes.
--
-- keys.lua comes before it; the first two keys are enough.
--
-- ARGV:
--   1  the caller's time, in ms
--
-- Returns { last, epoch, length } if nobody else has touched the session since its last element and
-- it has no gaps. Else read.lua must find out: { } if others have added something, of which that takes
-- note, and so need not be asked again; otherwise nothing. Writes nothing.

local facts = redis.pcall('HMGET', SESSION, 'mark', 'last', 'base', 'expires_at', 'epoch')
local last, base = tonumber(facts[2] or ''), tonumber(facts[3] or '')
if not last or not base or not tonumber(facts[5] or '') or (facts[1] or '') == '' then
  return nil
end
-- With gaps, `last` is too large for this.
local length = redis.pcall('LLEN', LIST)
if type(length) == 'number' and length > last - base then
  return {}
end
if length ~= last - base or not has_mark(redis.call('LINDEX', LIST, '0'), facts[1]) then
  return nil
end
local left = redis.call('PTTL', LIST)
local expires_at = tonumber(facts[4] or '')
local is_kept = expires_at and left >= 0 and math.abs(ARGV[1] + left - expires_at) <= 1000
if left ~= -1 and not is_kept or left == -1 and expires_at then
  return nil
end
return { last, tonumber(facts[5]), length }
