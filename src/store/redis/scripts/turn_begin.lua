-- Begins a turn on a session that has none, or runs a failed one anew.
--
-- ARGV:
--   1  turn
--   2  fingerprint of what was asked, 16 bytes
--   3  the turn's name
--   4  the request
--   5  token
--   6  how long the lease lasts, in ms
--   7  how long the record stays after that, in ms
--   8  how many numbers of events to reserve
--   9  1 to wait in line, else 0
--
-- Returns, besides what keys.lua says:
--   { 'leased', … }                    see turns.lua
--   { 'exists', state }                the turn runs or has completed
--   { 'busy', turn, name, is_expired } another turn runs
--   { 'waiting', before, turn }        in line; the turn that runs if its lease has run out, or ''
--   { 'line full' }
--   { 'reused' }                       the turn has another fingerprint
--
-- The first write is an HSET, which Redis refuses when it is out of memory.

-- Of the oldest turns, how many to look at whether they can go.
local OLDEST = 2

local turn, token, reserve = ARGV[1], ARGV[5], tonumber(ARGV[8])
local lease_ms, retention_ms, waits = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[9] == '1'

local session, refusal = reconcile()
if not session then
  return refusal
end
local now = session.now
local values
values, refusal = fields(turn, request_field(turn), 'running', 'line', 'first_turn', 'last_turn')
if not values then
  return refusal
end
if session.is_cleared then
  values = {}
end

local line = {}
for from = 1, #(values[4] or ''), 24 do
  local place = { turn = string.sub(values[4], from, from + 15) }
  place.asked_ms = struct.unpack('>I8', values[4], from + 16)
  if now - place.asked_ms < PLACE_MS then
    line[#line + 1] = place
  end
end
local function pack_line()
  local parts = {}
  for _, place in ipairs(line) do
    parts[#parts + 1] = place.turn .. struct.pack('>I8', place.asked_ms)
  end
  return table.concat(parts)
end

local found = known(values[1], now)
if found and found.state == 'completed' and (session.is_new or session.has_expired) then
  -- Its messages have gone with the list.
  found = nil
end
if found then
  if found.print ~= ARGV[2] then
    return { 'reused' }
  end
  if found.state == 'running' and found.token == token then
    return leased(found, values[2], reserve)
  elseif found.state ~= 'failed' then
    return { 'exists', state_of(found, now) }
  end
end

local running = values[3] or ''
local other = nil
if running ~= '' then
  other = known(redis.call('HGET', TURNS, running), now)
  if other and other.state ~= 'running' then
    other = nil
  end
end
if other and not waits then
  return { 'busy', running, other.name, is_expired(other, now) and 1 or 0 }
end
local index = nil
for step, place in ipairs(line) do
  index = index or place.turn == turn and step
end
local before = index and index - 1 or #line
if waits and (other or before > 0) then
  if index then
    line[index].asked_ms = now
  elseif #line >= WAITING_MAX then
    return { 'line full' }
  else
    line[#line + 1] = { turn = turn, asked_ms = now }
  end
  redis.call('HSET', TURNS, 'line', pack_line())
  return { 'waiting', before, other and is_expired(other, now) and running or '' }
end

-- What others have done to the list, so that what they do from now on is noticed.
if session.is_changed then
  save(session)
end

-- What is there of this turn, also if it is forgotten.
local old = values[1] and cmsgpack.unpack(values[1])
local first_turn, last_turn = tonumber(values[5] or 1), tonumber(values[6] or 0) + 1
local record = {
  ordinal = last_turn,
  name = ARGV[3],
  print = ARGV[2],
  state = 'running',
  attempt = 0,
  tries = 0,
  reserved = 0,
  first_chunk = 0,
  next_chunk = 0,
  stop = '',
  list_until_ms = session.expires_at,
}
if found then
  -- What was said before is of no use to anyone once the turn runs anew; its numbers stay taken.
  record.name = found.name
  record.attempt = found.attempt
  record.reserved = found.reserved
  record.first_chunk = found.next_chunk
  record.next_chunk = found.next_chunk
end
start(record, token, lease_ms, retention_ms, reserve, now)
if index then
  table.remove(line, index)
end
local others = { request_field(turn), ARGV[4], 'running', turn, 'line', pack_line(),
  'first_turn', decimal(first_turn), 'last_turn', decimal(last_turn),
  ordinal_field(last_turn), turn }
redis.call('HSET', TURNS, turn, cmsgpack.pack(record), unpack(others))
if old then
  delete_chunks(turn, old)
  redis.call('HDEL', TURNS, ordinal_field(old.ordinal))
end

-- Forgets old turns. One that has gone, or was begun anew since, has another ordinal or none.
local function forget(ordinal)
  local oldest = redis.call('HGET', TURNS, ordinal_field(ordinal))
  local packed = oldest and redis.call('HGET', TURNS, oldest)
  local has = packed and cmsgpack.unpack(packed)
  if has and has.ordinal == ordinal then
    if now < has.forget_ms then
      return false
    end
    delete_chunks(oldest, has)
    redis.call('HDEL', TURNS, oldest, request_field(oldest))
  end
  redis.call('HDEL', TURNS, ordinal_field(ordinal))
  return true
end
local next_turn = first_turn
for ordinal = first_turn, math.min(first_turn + OLDEST, last_turn) - 1 do
  if forget(ordinal) and ordinal == next_turn then
    next_turn = ordinal + 1
  end
end
if next_turn > first_turn then
  redis.call('HSET', TURNS, 'first_turn', decimal(next_turn))
end
expire_turns(record, now)
ring()
return leased(record, ARGV[4], reserve)
