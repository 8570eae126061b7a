-- Ends a turn: appends its elements, writes the last of its log, and makes room for the next turn,
-- in one step.
--
-- ARGV:
--   1  turn
--   2  token
--   3  how long the record stays, in ms
--   4  the caller's time, in ms
--   5  the outcome
--   6  the index of the chunk to add; '' for none
--   7  the chunk
--   8… the elements, oldest first; none: the turn has failed
--
-- Returns, besides what keys.lua says:
--   { 'ended', state }   perhaps by an earlier call
--   { 'cleared' }        there is no such turn, or others have cleared the session. A list that
--                        expired is not a clear: the turn is stored into a session that starts anew
--   { 'lease lost' }     the token is another
--
-- All checks come before the first write, and the first write is LPUSH, or HSET if there are no
-- elements: Redis refuses both when it is out of memory.

local FIRST_ELEMENT = 8

local turn = ARGV[1]
local session, refusal = reconcile()
if not session then
  return refusal
end
local values
values, refusal = fields(turn, 'running')
if not values then
  return refusal
end
if session.is_cleared then
  -- First, since deleting is allowed when memory has run out, and then so is the rest.
  redis.call('UNLINK', TURNS)
  save(session)
  ring()
  return { 'cleared' }
end
local now = session.now
local record = known(values[1], now)
if not record then
  return { 'cleared' }
end
if record.token ~= ARGV[2] then
  return { 'lease lost' }
end
if record.state ~= 'running' then
  return { 'ended', state_of(record, now) }
end

local others = values[2] == turn and { 'running', '' } or {}
add_chunk(turn, record, ARGV[6], ARGV[7], others)
local is_completed = #ARGV >= FIRST_ELEMENT
if is_completed then
  record.state = 'completed'
  record.first, record.count = push(session, FIRST_ELEMENT, #ARGV)
  record.time_ms = ARGV[4]
else
  record.state = 'failed'
end
record.outcome = ARGV[5]
record.forget_ms = now + tonumber(ARGV[3])
record.list_until_ms = session.expires_at
write(turn, record, others, now)
if is_completed then
  redis.call('HDEL', TURNS, request_field(turn))
end
ring()
return { 'ended', state_of(record, now) }
