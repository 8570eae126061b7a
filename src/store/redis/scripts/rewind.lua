-- Deletes the elements after a sequence: in one step, once per request.
--
-- ARGV:
--   1  request id, 8 bytes
--   2  stamp, 10 bytes, as for append.lua
--   3  the sequence
--   4  the last sequence that the session must have; '' for any
--
-- Returns, besides what keys.lua says:
--   { 'rewound', count }     so many went, now or by an earlier call
--   { 'reused' }             an earlier call with this request id asked for something else
--   { 'mismatch', last }     the last sequence is another
--   { 'busy', turn, name }   a turn runs
--   { 'too many' }           REWINDS_MAX is reached
--
-- All checks come before the first write. That is LTRIM, since deleting is allowed when memory has
-- run out, and then so is the rest; or what `remember` begins with if there is nothing to delete.

local session, refusal = reconcile()
if not session then
  return refusal
end
local record
record, refusal = recall(session, ARGV[1])
if refusal then
  return refusal
end
if record then
  if not is_same(record, ARGV[2]) then
    return { 'reused' }
  end
  return { 'rewound', tonumber(string.match(record, ':(%d+)$', 11) or 1) }
end
if ARGV[4] ~= '' and tonumber(ARGV[4]) ~= session.last then
  return { 'mismatch', session.last }
end
local values
values, refusal = fields('running', 'first_turn', 'last_turn')
if not values then
  return refusal
end
if session.is_cleared then
  values = {}
end
local running = values[1] or ''
if running ~= '' then
  local other = known(redis.call('HGET', TURNS, running), session.now)
  if other and other.state == 'running' then
    return { 'busy', running, other.name }
  end
end

local after = tonumber(ARGV[3])
local newest = session.base + session.length
local place = math.min(math.max(place_at(session, after), session.base), newest)
local count = newest - place
-- What comes next has the next sequence, and the place after those that stay.
local gaps = {}
for index = 1, #session.gaps, 2 do
  if session.gaps[index] < place then
    gaps[#gaps + 1] = session.gaps[index]
    gaps[#gaps + 1] = session.gaps[index + 1]
  end
end
gaps[#gaps + 1] = place
gaps[#gaps + 1] = session.last - place
if count > 0 and place > session.base and #gaps / 2 > REWINDS_MAX then
  return { 'too many' }
end

if count > 0 then
  redis.call('LTRIM', LIST, decimal(count), '-1')
  session.length = session.length - count
  session.gaps = gaps
  fold_gaps(session)
  session.mark = ''
  if session.length > 0 then
    session.mark = fingerprint(redis.call('LINDEX', LIST, '0'))
  else
    session.expires_at = nil
  end
end
-- The facts first: with those of a session that others have cleared, its old records go.
if count > 0 or session.is_changed then
  live_on(session)
  save(session)
end
remember(session, ARGV[1], ARGV[2], after, count)

-- The turns that have stored any of these: those that ended last, and failed ones between them,
-- which stay.
if count > 0 and values[3] then
  local last_turn = 0
  for ordinal = tonumber(values[3]), tonumber(values[2] or 1), -1 do
    local turn = redis.call('HGET', TURNS, ordinal_field(ordinal))
    local packed = turn and redis.call('HGET', TURNS, turn)
    local has = packed and cmsgpack.unpack(packed)
    if has and has.ordinal == ordinal then
      local is_completed = has.state == 'completed'
      if is_completed and has.first + has.count - 1 <= after then
        last_turn = math.max(last_turn, ordinal)
        break
      elseif is_completed then
        delete_chunks(turn, has)
        redis.call('HDEL', TURNS, turn, request_field(turn), ordinal_field(ordinal))
      else
        last_turn = math.max(last_turn, ordinal)
      end
    end
  end
  if last_turn < tonumber(values[3]) then
    -- So that the last one that is there can be found. If none is, nothing needs the number.
    last_turn = math.max(last_turn, tonumber(values[2] or 1) - 1)
    redis.call('HSET', TURNS, 'last_turn', decimal(last_turn))
  end
end
if count > 0 then
  ring()
end
return { 'rewound', count }
