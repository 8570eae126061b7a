-- Asks the holder of a running turn to stop it.
--
-- ARGV:
--   1  turn; '' for the one that runs
--   2  'keep' or 'discard'
--
-- Returns, besides what keys.lua says:
--   { 'turn', turn, name, state }   as it is now
--   { 'unknown' }                   there is no such turn

local values, refusal = fields(ARGV[1], 'running')
if not values then
  return refusal
end
local turn, packed = ARGV[1], values[1]
if turn == '' then
  turn = values[2] or ''
  packed = turn ~= '' and redis.call('HGET', TURNS, turn)
end
local now = clock()
local record = known(packed, now)
if not record or is_gone(record) then
  return { 'unknown' }
end
if record.state == 'running' and record.stop ~= ARGV[2] then
  record.stop = ARGV[2]
  redis.call('HSET', TURNS, turn, cmsgpack.pack(record))
  ring()
end
return { 'turn', turn, record.name, state_of(record, now) }
