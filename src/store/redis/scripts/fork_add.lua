-- Adds elements to a copy that is being made.
--
-- KEYS, besides those of the new session:
--   6  the copy, a LIST
--
-- ARGV:
--   1  how many elements the copy has before this
--   2  how long the copy stays, in ms, if nothing is added to it
--   3… the elements, oldest first
--
-- Returns:
--   { 'added' }     now or by an earlier call
--   { 'changed' }   the copy is another one, or has gone

local FIRST_ELEMENT = 3
local count = #ARGV - FIRST_ELEMENT + 1
local length = redis.call('LLEN', KEYS[6])
if length == tonumber(ARGV[1]) + count then
  return { 'added' }
elseif length ~= tonumber(ARGV[1]) then
  return { 'changed' }
end
redis.call('LPUSH', KEYS[6], unpack(ARGV, FIRST_ELEMENT))
redis.call('PEXPIRE', KEYS[6], ARGV[2])
return { 'added' }
