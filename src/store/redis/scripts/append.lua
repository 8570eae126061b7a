-- Adds elements at the new end of sessions: each append in one step, once per request. Those of many
-- callers come together, where one Redis has all sessions; none has to do with the others.
--
-- KEYS: those that keys.lua names, of each append.
-- ARGV:
--   1  the caller's day, since 1970
-- and then of each append:
--   1  request id, 8 bytes
--   2  stamp, 10 bytes: fingerprint of what was asked (4), the caller's time (6)
--   3  the mark of the last element, if the caller knows one: an id that is in it; else ''
--   4  '', or the last sequence that the session must have, `,`, and the epoch that it must have;
--      either may be left out
--   5  how many elements there are
--   6… the elements, oldest first
--
-- Returns a list of what each came to, the sequence of its first element; or, besides what keys.lua
-- says:
--   { 'repeated', record }    an earlier call had stored them
--   { 'reused' }              an earlier call with this request id asked for something else
--   { 'cleared' }             the epoch is another
--   { 'mismatch', last }      the last sequence is another
--
-- All checks of an append come before its first write, and whatever makes Redis refuse writes
-- (memory, disk, a replica) makes it refuse that one: nothing has happened then.

local append_whole
local replies, at = {}, 1
for key = 0, #KEYS - 1, 5 do
  local count = tonumber(ARGV[at + 5])
  local first = append_plain(key, at, count)
  if not first then
    append_whole = append_whole or whole_way()
    first = append_whole(key, at, count)
  end
  replies[#replies + 1] = first
  at = at + 5 + count
end
return replies
