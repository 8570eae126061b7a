-- What the scripts on a session's elements have in common. base.lua comes before it.

local REQUESTS = { [0] = KEYS[3], [1] = KEYS[4] }

-- Lua cannot pass more than about 8,000 arguments.
local CHUNK = 1000

-- Looks at 288 bytes at most, since this is what a write costs most: at those that differ from one
-- element to the next. LangChain's begin alike, with 36 to 39 bytes up to the content, and end alike,
-- with about 110 bytes after it, or with an id among them. No bytes of an element are kept: the facts
-- may outlive the list.
local function fingerprint(element)
  local parts = #element .. ':' .. string.sub(element, 33, 160) .. string.sub(element, -160)
  return string.sub(redis.sha1hex(parts), 1, 16)
end

-- Whether an element, if there is one, is known by this mark, which is not ''.
local function has_mark(element, mark)
  if string.sub(mark, 1, 3) == 'cm_' then
    return element and string.find(element, mark, 1, true) ~= nil
  end
  return element and fingerprint(element) == mark
end

-- Reads the facts and compares them with the list. Writes nothing. Returns the session as it is
-- now, with `is_changed` if the facts need saving, `is_cleared` if the list was deleted by others
-- since, `has_expired` if it has expired since, `is_new` if it holds nothing, because it has expired or
-- never did, and `is_known` if there are facts; or nil and what the script must return.
local function reconcile()
  local length = redis.pcall('LLEN', LIST)
  local refusal = refusal_of(length, LIST)
  if refusal then
    return nil, refusal
  end
  local facts = redis.pcall('HMGET', SESSION, 'base', 'last', 'mark', 'epoch', 'expires_at',
    'gaps', 'ttl', 'day')
  refusal = refusal_of(facts, SESSION)
  if refusal then
    return nil, refusal
  end

  local session = {
    now = clock(),
    length = length,
    base = 0,
    last = 0,
    mark = '',
    epoch = 0,
    gaps = {},
    had_gaps = facts[6] ~= false,
    ttl = tonumber(facts[7] or ''),
    day = facts[8] or nil,
    is_changed = false,
    is_cleared = false,
    is_known = facts[2] and true or false,
    is_new = not facts[2] and length == 0,
    has_expired = false,
    -- The facts as they are kept; none that equals these is written.
    kept = {},
  }
  session.old_gaps = session.gaps
  -- What the sequence of the newest element is above its place.
  local had_expiry, extra = nil, 0
  if facts[2] then
    session.base = tonumber(facts[1] or '')
    session.last = tonumber(facts[2])
    session.mark = facts[3] or ''
    session.epoch = tonumber(facts[4] or '0')
    had_expiry = tonumber(facts[5] or '')
    local has_gaps = true
    if session.had_gaps then
      has_gaps, session.gaps = pcall(cmsgpack.unpack, facts[6])
      has_gaps = has_gaps and type(session.gaps) == 'table'
      session.old_gaps = session.gaps
      extra = has_gaps and tonumber(session.gaps[#session.gaps])
      has_gaps = extra ~= nil and extra ~= false
    end
    local is_sound = has_gaps and session.base and session.last and session.epoch
      and session.base >= 0 and session.base <= session.last - extra
    if not is_sound then
      return nil, { 'corrupt', SESSION }
    end
    session.kept = { session.base, session.last, session.mark, session.epoch, had_expiry or '' }
  end

  -- Is the newest element that we know of still where it was? LangChain only adds at the head, so
  -- it stays where it is, seen from the tail, unless somebody deleted.
  local newest = session.last - extra
  local is_intact = session.base + length >= newest
  if is_intact and newest > session.base then
    local index = session.base + length - newest
    is_intact = session.mark ~= '' and has_mark(redis.call('LINDEX', LIST, index), session.mark)
  end
  if not is_intact then
    -- All that is there now is new: it gets numbers that nobody has seen. Only a session that
    -- expired starts anew, unless somebody has begun it anew since: numbers that are too high do no
    -- harm, and perhaps it did not expire. The list and this clock may differ by a little.
    local has_expired = had_expiry and session.now >= had_expiry - 1000 or false
    session.base = has_expired and length == 0 and 0 or session.last
    session.last = session.base
    session.mark = ''
    -- One that was never cleared reads the same before and after its facts go, too.
    if not has_expired or session.epoch > 0 then
      session.epoch = session.epoch + 1
    end
    session.gaps = {}
    session.ttl = nil
    newest, extra = session.base, 0
    session.is_changed = true
    session.is_new = has_expired and length == 0
    session.has_expired = has_expired
    session.is_cleared = not has_expired
  end

  -- What others have added since.
  if session.base + length ~= newest then
    session.last = session.base + length + extra
    session.mark = fingerprint(redis.call('LINDEX', LIST, '0'))
    session.is_changed = true
  end

  -- What others have done to the expiry since. The clock has moved a little between the two
  -- commands, so small differences mean nothing.
  if length > 0 then
    local left = redis.call('PTTL', LIST)
    if left >= 0 then
      session.expires_at = session.now + left
    end
    local is_other = (had_expiry == nil) ~= (session.expires_at == nil)
      or had_expiry and math.abs(had_expiry - session.expires_at) > 1000
    if is_other then
      session.is_changed = true
    else
      session.expires_at = had_expiry
    end
  end
  return session
end

-- The place of the newest element with at most this sequence, if there were elements at all places.
local function place_at(session, sequence)
  local gaps, place_max = session.gaps, math.huge
  for index = #gaps - 1, 1, -2 do
    if sequence > gaps[index] + gaps[index + 1] then
      return math.min(sequence - gaps[index + 1], place_max)
    end
    place_max = gaps[index]
  end
  return math.min(sequence, place_max)
end

-- The sequence of the element at this place; and the places between which, the second included, the
-- difference is the same.
local function sequence_at(session, place)
  local gaps, last = session.gaps, math.huge
  for index = #gaps - 1, 1, -2 do
    if place > gaps[index] then
      return place + gaps[index + 1], gaps[index], last
    end
    last = gaps[index]
  end
  return place, -math.huge, last
end

-- Forgets gaps before the oldest element: it takes what they add into the base.
local function fold_gaps(session)
  local gaps, kept, extra = session.gaps, {}, 0
  for index = 1, #gaps, 2 do
    if gaps[index] <= session.base then
      extra = gaps[index + 1]
    else
      kept[#kept + 1] = gaps[index] + extra
      kept[#kept + 1] = gaps[index + 1] - extra
    end
  end
  session.base = session.base + extra
  session.gaps = kept
end

local function delete_chunks(turn, record)
  for from = record.first_chunk, record.next_chunk - 1, CHUNK do
    local names = {}
    for index = from, math.min(from + CHUNK, record.next_chunk) - 1 do
      names[#names + 1] = chunk_field(turn, index)
    end
    redis.call('HDEL', TURNS, unpack(names))
  end
end

-- Forgets the turns that have completed and whose messages have gone with a list that expired. One
-- that runs goes on: nobody cleared the session.
local function forget_completed(session)
  local bounds = redis.pcall('HMGET', TURNS, 'first_turn', 'last_turn')
  if bounds.err or not bounds[2] then
    return
  end
  for ordinal = tonumber(bounds[1]), tonumber(bounds[2]) do
    local turn = redis.call('HGET', TURNS, ordinal_field(ordinal))
    local packed = turn and redis.call('HGET', TURNS, turn)
    local record = packed and cmsgpack.unpack(packed)
    local is_gone = session.is_new or session.has_expired
      or record and record.list_until_ms and record.list_until_ms <= session.now
    if record and record.state == 'completed' and is_gone then
      delete_chunks(turn, record)
      redis.call('HDEL', TURNS, turn)
    end
  end
end

-- Lets {K}:turns live as long as the newest of its records, but no longer than the list; also where that
-- lives longer than it did. A turn that runs goes on without the list.
local function keep_turns(session)
  local values = redis.pcall('HMGET', TURNS, 'running', 'last_turn')
  if values.err or not values[2] then
    return
  end
  local left = (session.expires_at or math.huge) - session.now
  if values[1] and values[1] ~= '' then
    left = math.max(left, LINGER_MS)
  end
  local has = redis.call('PTTL', TURNS)
  if has < left then
    local turn = redis.call('HGET', TURNS, ordinal_field(tonumber(values[2])))
    local packed = turn and redis.call('HGET', TURNS, turn)
    local newest = packed and cmsgpack.unpack(packed)
    left = newest and math.min(left, newest.forget_ms - session.now)
    if not left or left <= has then
      return
    end
  end
  expire_in(TURNS, left, has)
end

-- Whether the plain case of an append would leave nothing out.
local function is_plain(session)
  return #session.gaps == 0 and not session.expires_at and (session.ttl or TTL_MS or 0) == 0
end

local function day_of(session)
  return math.floor(session.now / REQUEST_MEMORY_MS)
end

-- The day of the newest record; nil if there is none.
local function newest_day(session)
  return tonumber(string.match(session.day or '', '^%d+'))
end

-- Notes which day that is, and what the plain case of an append has to know.
local function note_day(session, day, how)
  local text = decimal(day) .. how
  if text ~= session.day then
    redis.call('HSET', SESSION, 'day', text)
    session.day = text
  end
end

-- Lets the records of a day expire an hour after the end of the following day, when all of them are
-- over 24 hours old; or with the list, if that is earlier.
local function expire_requests(session, day)
  local left = (day + 2) * REQUEST_MEMORY_MS + LINGER_MS - session.now
  if session.expires_at then
    left = math.min(left, session.expires_at - session.now)
  end
  expire_in(REQUESTS[day % 2], left)
end

-- The facts that each session has, in the order of `session.kept`.
local FACTS = { 'base', 'last', 'mark', 'epoch', 'expires_at' }
-- What those that may be absent are then.
local ABSENT = { mark = '', epoch = 0, expires_at = '' }

-- Writes the facts that have changed, and the expiry of all companion keys that has. HSET is the only
-- command here that Redis refuses when it is out of memory, and it does so only if it is the script's
-- first write.
local function save(session)
  local kept, changes = session.kept, {}
  -- The facts of a session that has elements and no expiry have none either.
  local is_lasting = kept[3] and kept[3] ~= '' and kept[5] == ''
  for index = 1, #FACTS do
    local value = session[FACTS[index]] or ''
    if value ~= (kept[index] or ABSENT[FACTS[index]]) then
      changes[#changes + 1] = FACTS[index]
      changes[#changes + 1] = value
    end
  end
  local has_other_expiry = kept[5] ~= (session.expires_at or '')
  session.kept = { session.base, session.last, session.mark, session.epoch,
    session.expires_at or '' }
  if #changes > 0 then
    redis.call('HSET', SESSION, unpack(changes))
  end
  if session.gaps == session.old_gaps then
    -- They may be long, and seldom change.
  elseif #session.gaps > 0 then
    redis.call('HSET', SESSION, 'gaps', cmsgpack.pack(session.gaps))
  elseif session.had_gaps then
    redis.call('HDEL', SESSION, 'gaps')
  end
  if session.length > 0 and not session.expires_at then
    if not is_lasting then
      redis.call('PERSIST', SESSION)
    end
  else
    -- The facts live as long as the list. Those of a session that was cleared live longer: for a
    -- turn that runs, which must find that it was cleared; and where they hold a base and there is no
    -- list, for those who remember sequences. A session that expires starts at 1 again.
    local left = (session.expires_at or session.now) - session.now
    if session.epoch > 0 then
      left = left + LINGER_MS
    end
    if session.base > 0 and session.length == 0 then
      left = math.max(left, TOMBSTONE_MS)
    end
    expire_in(SESSION, left)
  end

  if session.is_cleared then
    redis.call('UNLINK', REQUESTS[0], REQUESTS[1], TURNS)
  elseif session.is_new or session.has_expired or not session.is_known then
    if session.has_expired then
      redis.call('UNLINK', REQUESTS[0], REQUESTS[1])
    end
    forget_completed(session)
  end
  if session.is_cleared or session.has_expired then
    redis.call('HDEL', SESSION, 'ttl', 'title', 'metadata', 'origin')
  end
  if session.is_cleared or session.has_expired then
    redis.call('HDEL', SESSION, 'day')
    session.day = nil
  elseif session.day and not is_plain(session) then
    note_day(session, newest_day(session), '-')
  end
  if session.expires_at or has_other_expiry then
    keep_turns(session)
  end
  if has_other_expiry then
    local today = day_of(session)
    expire_requests(session, today - 1)
    expire_requests(session, today)
  end
end

-- Writes down what others have done to the list, for a call that otherwise only reads. A Redis that
-- refuses writes (a full disk, no memory) can still be read: without the record, the next call
-- comes to the same sequences.
local function take_note(session)
  if not session.is_changed then
    return
  end
  -- PERSIST needs no memory, so HSET after it is allowed when memory has run out.
  local reply = redis.pcall('PERSIST', SESSION)
  if type(reply) ~= 'table' then
    save(session)
  end
end

-- Starts the session's time to live anew, if it has one; else leaves the expiry as others have set
-- it. `save` comes after this.
local function live_on(session)
  local ttl = session.ttl or TTL_MS
  if not ttl or session.length == 0 then
    return
  elseif ttl > 0 then
    redis.call('PEXPIRE', LIST, decimal(ttl))
    session.expires_at = session.now + ttl
  elseif session.expires_at then
    redis.call('PERSIST', LIST)
    session.expires_at = nil
  end
end

-- Whether an element is a user's: LangChain writes the type first. Others need not.
local function is_of_user(element)
  if string.sub(element, 1, 16) == '{"type": "human"' then
    return true
  elseif not string.find(element, '"human"', 1, true) then
    return false
  end
  local is_json, value = pcall(cjson.decode, element)
  return is_json and type(value) == 'table' and value.type == 'human'
end

-- The first element of a user from one place to another, either way; nil if there is none, or none
-- among as many as one search looks at.
local function find_user(session, from, to)
  local step = from <= to and 1 or -1
  local left = math.min((to - from) * step + 1, TRIM_LOOKED_AT_MAX / 2)
  while left > 0 do
    local piece = math.min(left, 8)
    local low = math.min(from, from + step * (piece - 1)) - session.base
    local found = redis.call('LRANGE', LIST, decimal(-low - piece + 1), decimal(-low))
    for index = 1, #found do
      if is_of_user(found[step == 1 and #found - index + 1 or index]) then
        return from + step * (index - 1)
      end
    end
    from = from + step * piece
    left = left - piece
  end
  return nil
end

-- Removes the oldest exchanges of a session that has too many elements: enough of them if the rest
-- holds the beginning of one, else all but the newest.
local function trim(session)
  local excess = ELEMENTS_MAX and session.length - ELEMENTS_MAX or 0
  if excess <= 0 then
    return
  end
  local enough = session.base + excess + 1
  local first = find_user(session, enough, session.base + session.length)
    or excess > 1 and find_user(session, enough - 1, session.base + 2)
  if first and first > session.base + 1 then
    local count = first - session.base - 1
    redis.call('LTRIM', LIST, '0', decimal(-count - 1))
    session.base = session.base + count
    session.length = session.length - count
    fold_gaps(session)
  end
end

-- Adds these arguments at the new end of the session, trims it, and saves the facts. Returns the first
-- sequence, and how many elements these are. LPUSH is its first write. The mark of the last of them
-- may be known.
local function push(session, first_element, last_element, mark)
  local first = session.last + 1
  local count = last_element - first_element + 1
  for from = first_element, last_element, CHUNK do
    redis.call('LPUSH', LIST, unpack(ARGV, from, math.min(from + CHUNK - 1, last_element)))
  end
  session.length = session.length + count
  session.last = session.last + count
  session.mark = (mark or '') ~= '' and mark or fingerprint(ARGV[last_element])
  trim(session)
  live_on(session)
  save(session)
  return first, count
end

-- The record of a request; or nil, and what the script must return if that could not be found out.
local function recall(session, request)
  for bucket = 0, 1 do
    local record = redis.pcall('HGET', REQUESTS[bucket], request)
    local refusal = refusal_of(record, REQUESTS[bucket])
    if refusal then
      return nil, refusal
    end
    if record and not session.is_cleared and not session.has_expired then
      return record
    end
  end
  return nil
end

-- Whether a record is that of a request with this stamp.
local function is_same(record, stamp)
  return string.sub(record, 1, 4) == string.sub(stamp, 1, 4)
end

-- Keeps the record of a request, and returns it. `save` comes before this.
local function remember(session, request, stamp, first, count)
  local record = stamp .. decimal(first)
  if count ~= 1 then
    record = record .. ':' .. decimal(count)
  end
  local today, newest = day_of(session), newest_day(session)
  if newest and newest < today then
    -- What is there is of the day before yesterday, or older.
    redis.call('UNLINK', REQUESTS[today % 2])
  end
  redis.call('HSET', REQUESTS[today % 2], request, record)
  expire_requests(session, today)
  if session.length == 0 and redis.call('EXISTS', SESSION) == 0 then
    -- There is nothing that the day could go with.
    return record
  elseif not is_plain(session) then
    note_day(session, math.max(newest or 0, today), '-')
  elseif newest ~= today or string.sub(session.day, -1) == '-' then
    -- Also where the clock has gone back, and this record is the older one.
    local has_older = redis.call('EXISTS', REQUESTS[(today + 1) % 2]) == 1
    note_day(session, math.max(newest or 0, today), has_older and '+' or '')
  end
  return record
end
