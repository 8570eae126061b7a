-- Returns a page of a session's elements.
--
-- ARGV:
--   1  'oldest first' or 'newest first'
--   2  only greater sequences
--   3  only smaller sequences; '' for all
--   4  only the newest so many of those; '' for all
--   5  at most so many elements
--   6  at most so many bytes of elements, except that the first one always comes
--   7  of an element above so many bytes, only the size
--
-- Returns, besides what keys.lua says:
--   { 'page', last, epoch, after, more, runs, elements }
--     last      the session's last sequence
--     epoch     the session's epoch
--     after     argument 2, or what argument 4 makes of it
--     more      1 if the range holds more elements, else 0
--     runs      the sequences: the first of a run, and how many elements it has, for each run
--     elements  each a string, or a number: the size
--
-- Writes only if others have changed the session since the last call: it gives out sequences, and
-- they must be remembered. And if it starts the session's time to live anew: only once a twentieth of
-- that has passed since the last time, so that most reads write nothing.

-- The list is read in pieces, so that no more than one piece is read in vain when the bytes run
-- out. The first is small, the others fit what the elements read so far are like.
local PIECE_FIRST, PIECE_MAX = 8, 32

local order, after, count_max, bytes_max, element_max =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local session, refusal = reconcile()
if not session then
  return refusal
end
take_note(session)
local ttl = READS_EXTEND and (session.ttl or TTL_MS) or 0
if ttl > 0 and session.length > 0 then
  local left = session.expires_at and session.expires_at - session.now or math.huge
  if left > ttl or left < ttl - ttl / 20 then
    -- As in take_note: PERSIST needs no memory, and a Redis that refuses writes can be read.
    if type(redis.pcall('PERSIST', SESSION)) ~= 'table' then
      live_on(session)
      save(session)
    end
  end
end

-- From here on by places, which have no gaps.
local newest = session.base + session.length
if ARGV[3] ~= '' then
  newest = math.min(newest, place_at(session, tonumber(ARGV[3]) - 1))
end
local before_oldest = place_at(session, after)
if ARGV[4] ~= '' then
  local place = newest - tonumber(ARGV[4])
  if place > before_oldest then
    before_oldest = place
    after = sequence_at(session, place)
  end
end
local oldest = math.max(before_oldest, session.base) + 1
local wanted = math.max(math.min(newest - oldest + 1, count_max), 0)

-- The elements from the place `from` to `to`, newest first.
local function range(from, to)
  local head = session.base + session.length
  return redis.call('LRANGE', LIST, decimal(head - to), decimal(head - from))
end

local elements, bytes, is_full = {}, 0, false
while #elements < wanted and not is_full do
  local done = #elements
  local piece = PIECE_FIRST
  if done > 0 then
    local bytes_average = math.max(bytes / done, 1)
    piece = math.max(math.min(math.floor((bytes_max - bytes) / bytes_average), PIECE_MAX), 1)
  end
  piece = math.min(piece, wanted - done)

  local found
  if order == 'newest first' then
    found = range(newest - done - piece + 1, newest - done)
  else
    found = range(oldest + done, oldest + done + piece - 1)
  end
  for step = 1, #found do
    local element = found[order == 'newest first' and step or #found - step + 1]
    local is_too_large = #element > element_max
    local size = is_too_large and 0 or #element
    if #elements > 0 and bytes + size > bytes_max then
      is_full = true
      break
    end
    bytes = bytes + size
    elements[#elements + 1] = is_too_large and #element or element
  end
end

local runs, done = {}, 0
while done < #elements do
  local place = order == 'newest first' and newest - done or oldest + done
  local sequence, before, last = sequence_at(session, place)
  local count = order == 'newest first' and place - before or last - place + 1
  count = math.min(count, #elements - done)
  runs[#runs + 1] = sequence
  runs[#runs + 1] = count
  done = done + count
end
local more = newest - oldest + 1 > #elements and 1 or 0
return { 'page', session.last, session.epoch, after, more, runs, elements }
