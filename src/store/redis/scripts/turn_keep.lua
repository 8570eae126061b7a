-- Extends the lease of a turn and adds to its log.
--
-- ARGV:
--   1  turn
--   2  token
--   3  how long the lease lasts, in ms
--   4  how long the record stays after that, in ms
--   5  how many numbers of events to reserve
--   6  the number of the last event
--   7  the index of the chunk to add; '' for none
--   8  the chunk
--
-- Returns, besides what keys.lua says:
--   { 'kept', stop, followed, index }   'keep', 'discard' or ''; how long ago a follower was noted,
--                                       in ms, or ''; 1 to enter the turn into the index of running
--                                       turns once more, since others may have deleted it, else 0
--   { 'cleared' }                       there is no such turn
--   { 'lease lost' }                    the token is another, or the turn has ended
--
-- Looks at {K}:turns only: this is what a turn does most.

local turn = ARGV[1]
local values, refusal = fields(turn)
if not values then
  return refusal
end
local now = clock()
local record = known(values[1], now)
if not record then
  return { 'cleared' }
end
if record.token ~= ARGV[2] or record.state ~= 'running' then
  return { 'lease lost' }
end
local others = {}
add_chunk(turn, record, ARGV[7], ARGV[8], others)
record.reserved = math.max(record.reserved, tonumber(ARGV[6]) + tonumber(ARGV[5]))
lease_to(record, ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), now)
-- Twice in a lease: an entry is then never due for a look while its turn has a holder.
local is_due = now - (record.indexed_ms or 0) >= tonumber(ARGV[3]) / 2
if is_due then
  record.indexed_ms = now
end
write(turn, record, others, now)
local followed = record.followed_ms and now - record.followed_ms or ''
return { 'kept', record.stop, followed, is_due and 1 or 0 }
