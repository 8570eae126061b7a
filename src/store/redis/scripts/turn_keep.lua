-- Extends the lease of a turn and adds to its log. This is what a turn does most: the script stands
-- alone, with one key and without functions, which Lua would make anew at each call. It says the same
-- as those of turns.lua, which describes the record, and base.lua: `known`, `lease_to`, `add_chunk`,
-- `expire_turns` and `expire_in`. Change both or none.
--
-- KEYS:
--   1  {K}:turns
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

local TURNS, turn = KEYS[1], ARGV[1]
local packed = redis.pcall('HGET', TURNS, turn)
if type(packed) == 'table' then
  if string.find(packed.err, 'WRONGTYPE', 1, true) then
    return { 'wrong type', TURNS }
  end
  return redis.error_reply(packed.err)
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local record = packed and cmsgpack.unpack(packed)
if not record or now >= record.forget_ms then
  return { 'cleared' }
end
if record.token ~= ARGV[2] or record.state ~= 'running' then
  return { 'lease lost' }
end

record.reserved = math.max(record.reserved, ARGV[6] + ARGV[5])
record.expires_ms = now + ARGV[3]
record.forget_ms = record.expires_ms + ARGV[4]
-- Twice in a lease: an entry is then never due for a look while its turn has a holder.
local is_due = now - (record.indexed_ms or 0) >= ARGV[3] / 2
if is_due then
  record.indexed_ms = now
end
if ARGV[7] ~= '' and tonumber(ARGV[7]) == record.next_chunk then
  record.next_chunk = record.next_chunk + 1
  redis.call('HSET', TURNS, turn, cmsgpack.pack(record), turn .. 'chunk:' .. ARGV[7], ARGV[8])
else
  redis.call('HSET', TURNS, turn, cmsgpack.pack(record))
end

local has = redis.call('PTTL', TURNS)
local left = math.max(record.forget_ms - now, has)
if record.list_until_ms then
  left = math.min(left, math.max(record.list_until_ms - now, LINGER_MS))
end
local late = math.min(500, left / 100)
if has < left or has > left + 2 * late then
  redis.call('PEXPIRE', TURNS, string.format('%.0f', left + late))
end
local followed = record.followed_ms and now - record.followed_ms or ''
return { 'kept', record.stop, followed, is_due and 1 or 0 }
