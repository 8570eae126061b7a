-- Adds elements at the new end of a session: in one step, once per request.
--
-- ARGV:
--   1  request id, 16 bytes
--   2  fingerprint of what was asked, 16 bytes
--   3  the caller's time, 8 bytes
--   4  the last sequence that the session must have; '' for any
--   5  the epoch that the session must have; '' for any
--   6… the elements, oldest first
--
-- Returns, besides what common.lua says:
--   { 'stored', record }
--   { 'repeated', record }    an earlier call had stored them
--   { 'reused' }              an earlier call with this request id asked for something else
--   { 'cleared' }             the epoch is another
--   { 'mismatch', last }      the last sequence is another
--
-- All checks come before the first write, and the first write is LPUSH: whatever makes Redis refuse
-- writes (memory, disk, a replica) makes it refuse that one, and nothing has happened.

local FIRST_ELEMENT = 6

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
  return { 'repeated', record }
end
if ARGV[5] ~= '' and tonumber(ARGV[5]) ~= session.epoch then
  return { 'cleared' }
end
if ARGV[4] ~= '' and tonumber(ARGV[4]) ~= session.last then
  return { 'mismatch', session.last }
end

local first, count = push(session, FIRST_ELEMENT)
record = remember(session, ARGV[1], ARGV[2], ARGV[3], first, count)
ring()
return { 'stored', record }
