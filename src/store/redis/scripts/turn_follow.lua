-- Reads a turn's state and a part of its log.
--
-- ARGV:
--   1  turn
--   2  chunks from this one on
--   3  chunks of so many bytes at most, except that the first one always comes
--   4  1 to let the holder know that somebody follows, else 0
--
-- Returns, besides what keys.lua says:
--   { 'turn', state, next, more, chunks }   where to go on; 1 if the log holds more, else 0
--   { 'unknown' }                           there is no such turn

local turn, bytes_max = ARGV[1], tonumber(ARGV[3])
local values, refusal = fields(turn)
if not values then
  return refusal
end
local now = clock()
local record = known(values[1], now)
if not record or is_gone(record) then
  return { 'unknown' }
end

local index = math.max(tonumber(ARGV[2]), record.first_chunk)
local chunks, bytes = {}, 0
while index < record.next_chunk do
  local chunk = redis.call('HGET', TURNS, chunk_field(turn, index))
  if not chunk then
    return { 'corrupt', TURNS }
  end
  if #chunks > 0 and bytes + #chunk > bytes_max then
    break
  end
  bytes = bytes + #chunk
  chunks[#chunks + 1] = chunk
  index = index + 1
end

local is_news = now - (record.followed_ms or 0) >= FOLLOWED_EVERY_MS
if ARGV[4] == '1' and record.state == 'running' and is_news then
  -- A Redis that refuses writes can still be read.
  record.followed_ms = now
  redis.pcall('HSET', TURNS, turn, cmsgpack.pack(record))
end
return { 'turn', state_of(record, now), index, index < record.next_chunk and 1 or 0, chunks }
