-- Takes a running turn whose lease has run out.
--
-- ARGV:
--   1  turn
--   2  token
--   3  how long the lease lasts, in ms
--   4  how long the record stays after that, in ms
--   5  how many numbers of events to reserve
--   6  1 to take it in any case, else 0
--   7  how often it is tried in all
--   8  the outcome of one that fails so
--
-- Returns, besides what keys.lua says:
--   { 'leased', … }      see turns.lua
--   { 'held' }           somebody else has it still
--   { 'ended', state }   perhaps by this call
--   { 'gone' }           there is no such turn
--
-- The first write is an HSET, which Redis refuses when it is out of memory.

local turn, token, reserve = ARGV[1], ARGV[2], tonumber(ARGV[5])
local lease_ms, retention_ms, by_force = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[6] == '1'

local values, refusal = fields(turn, request_field(turn), 'running')
if not values then
  return refusal
end
local now = clock()
local record = known(values[1], now)
if not record then
  return { 'gone' }
end
if record.state ~= 'running' then
  return { 'ended', state_of(record, now) }
end
if not values[2] then
  return { 'corrupt', TURNS }
end
if record.token ~= token then
  if not is_expired(record, now) and not by_force then
    return { 'held' }
  end
  if record.tries >= tonumber(ARGV[7]) and not by_force then
    record.state = 'failed'
    record.outcome = ARGV[8]
    record.forget_ms = now + retention_ms
    write(turn, record, values[3] == turn and { 'running', '' } or {}, now)
    ring()
    return { 'ended', state_of(record, now) }
  end
  start(record, token, lease_ms, retention_ms, reserve, now)
  write(turn, record, {}, now)
  ring()
end
return leased(record, values[2], reserve)
