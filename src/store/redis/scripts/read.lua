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
-- Returns, besides what common.lua says:
--   { 'page', last, epoch, after, first, more, elements }
--     last      the session's last sequence
--     epoch     the session's epoch
--     after     argument 2, or what argument 4 makes of it
--     first     the sequence of the first of the elements
--     more      1 if the range holds more elements, else 0
--     elements  each a string, or a number: the size
--
-- Writes only if others have changed the session since the last call: it gives out sequences, and
-- they must be remembered.

-- The list is read in pieces, so that no more than one piece is read in vain when the bytes run
-- out. The first is small, the others fit what the elements read so far are like.
local PIECE_FIRST, PIECE_MAX = 8, 32

local order, after, count_max, bytes_max, element_max =
  ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local session, refusal = reconcile()
if not session then
  return refusal
end
if session.is_changed then
  -- A Redis that refuses writes (a full disk, no memory) can still be read: without the record,
  -- the next call comes to the same sequences. PERSIST needs no memory, so HSET after it is
  -- allowed when memory has run out.
  local reply = redis.pcall('PERSIST', SESSION)
  if type(reply) ~= 'table' then
    save(session)
    expire_requests(session)
  end
end

local newest = session.last
if ARGV[3] ~= '' then
  newest = math.min(newest, tonumber(ARGV[3]) - 1)
end
if ARGV[4] ~= '' then
  after = math.max(after, newest - tonumber(ARGV[4]))
end
local oldest = math.max(after, session.base) + 1
local wanted = math.max(math.min(newest - oldest + 1, count_max), 0)

-- The elements from the sequence `from` to `to`, newest first.
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

local first = order == 'newest first' and newest or oldest
local more = newest - oldest + 1 > #elements and 1 or 0
return { 'page', session.last, session.epoch, after, first, more, elements }
