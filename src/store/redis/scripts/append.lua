-- Adds elements at the new end of a session: in one step, once per request.
--
-- ARGV:
--   1  request id, 8 bytes
--   2  stamp, 10 bytes: fingerprint of what was asked (4), the caller's time (6)
--   3  the caller's day, since 1970
--   4  the mark of the last element, if the caller knows one: an id that is in it; else ''
--   5  '', or the last sequence that the session must have, `,`, and the epoch that it must have;
--      either may be left out
--   6… the elements, oldest first
--
-- Returns the sequence of the first; or, besides what keys.lua says:
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
local last, epoch = string.match(ARGV[5], '^(-?%d*),(-?%d*)$')
if tonumber(epoch or '') and tonumber(epoch) ~= session.epoch then
  return { 'cleared' }
end
if tonumber(last or '') and tonumber(last) ~= session.last then
  return { 'mismatch', session.last }
end

local first, count = push(session, FIRST_ELEMENT, ARGV[4])
remember(session, ARGV[1], ARGV[2], first, count)
ring()
return first
