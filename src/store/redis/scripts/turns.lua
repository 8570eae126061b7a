-- What every script on turns but turn_keep.lua, which stands alone, begins with, after base.lua,
-- common.lua where it is about elements, too, and the limits, which Rust defines (`PLACE_MS`,
-- `WAITING_MAX`, `FOLLOWED_EVERY_MS`).
--
-- It says in Lua what ../../ledger.rs says in Rust, step by step: change both or none.
--
-- Fields of {K}:turns (T is a turn's id, 16 bytes):
--
--   running          T of the turn that runs; '' if none does
--   line             who waits: T and when it last asked (8 bytes, big-endian), for each
--   T                the turn's record, below
--   T request        what was asked (without the space, and so below)
--   T chunk:<index>  a chunk of its log
--   turn:<ordinal>   T of the turn that was begun as that one
--   first_turn       the ordinal of the oldest turn that may not be forgotten yet
--   last_turn        the ordinal of the newest
--
-- Record, as MessagePack:
--
--   ordinal        which turn of the session it is; a new one each time that it begins
--   name           the turn's id, for people
--   print          fingerprint of what was asked
--   state          'running', 'completed' or 'failed'
--   token          the token of the last lease
--   expires_ms     when that lease runs out
--   attempt        how often it was tried, ever
--   tries          how often since it was last begun
--   reserved       the last number for events that is taken
--   first_chunk    the log is the chunks from this one on…
--   next_chunk     …and before this one
--   stop           '', 'keep' or 'discard'
--   followed_ms    when a follower was last noted; nil if none was
--   indexed_ms     when the turn was last entered into the index of running turns; the file has no
--                  such index, and so no such field
--   forget_ms      when the record is forgotten
--   list_until_ms  when the list expires; nil if it does not, as far as begin and end have seen
--   outcome        how it ended, unless it runs
--   first, count, time_ms   what was stored, and the caller's time as text, if it has completed
--
-- State, in replies:
--
--   { 'running', 1 if the lease has run out else 0 }
--   { 'completed', first, count, time, outcome }
--   { 'failed', outcome }
--
-- Leased, in replies: { 'leased', attempt, first event, next chunk, name, print, request, stop }.
--
-- The whole key expires when its last record is forgotten, and with the list, unless a turn runs.

local function request_field(turn)
  return turn .. 'request'
end

-- Fields of {K}:turns; or nil and what the script must return.
local function fields(...)
  local values = redis.pcall('HMGET', TURNS, ...)
  local refusal = refusal_of(values, TURNS)
  if refusal then
    return nil, refusal
  end
  return values
end

-- The record in this field; nil if there is none or it is forgotten.
local function known(packed, now)
  local record = packed and cmsgpack.unpack(packed)
  if record and now < record.forget_ms then
    return record
  end
  return nil
end

-- Whether what a turn has stored has gone with the list.
local function is_gone(record)
  return record.state == 'completed' and redis.call('EXISTS', LIST) == 0
end

local function is_expired(record, now)
  return record.expires_ms <= now
end

local function state_of(record, now)
  if record.state == 'running' then
    return { 'running', is_expired(record, now) and 1 or 0 }
  elseif record.state == 'completed' then
    return { 'completed', record.first, record.count, record.time_ms, record.outcome }
  end
  return { 'failed', record.outcome }
end

-- Gives the lease to a token, from now on.
local function lease_to(record, token, lease_ms, retention_ms, now)
  record.token = token
  record.expires_ms = now + lease_ms
  record.forget_ms = record.expires_ms + retention_ms
end

-- Writes down a new attempt.
local function start(record, token, lease_ms, retention_ms, reserve, now)
  record.attempt = record.attempt + 1
  record.tries = record.tries + 1
  record.reserved = record.reserved + reserve
  record.indexed_ms = now
  lease_to(record, token, lease_ms, retention_ms, now)
end

local function leased(record, request, reserve)
  if not request then
    return { 'corrupt', TURNS }
  end
  return { 'leased', record.attempt, record.reserved - reserve + 1, record.next_chunk,
    record.name, record.print, request, record.stop }
end

-- Lets {K}:turns live as long as this record, which was just written, and as those before it; but
-- no longer than the list, unless a turn runs.
local function expire_turns(record, now)
  local has = redis.call('PTTL', TURNS)
  local left = math.max(record.forget_ms - now, has)
  if record.list_until_ms then
    local left_of_list = record.list_until_ms - now
    if record.state == 'running' then
      left_of_list = math.max(left_of_list, LINGER_MS)
    end
    left = math.min(left, left_of_list)
  end
  expire_in(TURNS, left, has)
end

-- Writes the record and other fields, with one HSET.
local function write(turn, record, others, now)
  redis.call('HSET', TURNS, turn, cmsgpack.pack(record), unpack(others))
  expire_turns(record, now)
end

-- Adds a chunk to a record and to the fields to write, unless an earlier call has. No chunk: ''.
local function add_chunk(turn, record, index, bytes, others)
  if index ~= '' and tonumber(index) == record.next_chunk then
    others[#others + 1] = chunk_field(turn, record.next_chunk)
    others[#others + 1] = bytes
    record.next_chunk = record.next_chunk + 1
  end
end
