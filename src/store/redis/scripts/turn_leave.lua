-- Takes a turn out of the line.
--
-- ARGV:
--   1  turn
--   2  only if it has not asked for so many ms
--
-- Returns, besides what keys.lua says:
--   { 'left' }   also if it did not stand there

local values, refusal = fields('line')
if not values then
  return refusal
end
local line, now = values[1] or '', clock()
for from = 1, #line, 24 do
  local asked_ms = struct.unpack('>I8', line, from + 16)
  if string.sub(line, from, from + 15) == ARGV[1] and now - asked_ms >= tonumber(ARGV[2]) then
    line = string.sub(line, 1, from - 1) .. string.sub(line, from + 24)
    redis.call('HSET', TURNS, 'line', line)
    break
  end
end
return { 'left' }
