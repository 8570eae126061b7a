-- Tells what there is to know of a session.
--
-- ARGV:
--   1  the sequence that the floor is wanted for
--   2  1 if the request of the turn is wanted, else 0
--
-- Returns, besides what keys.lua says: seen, as seen.lua says.
--
-- Writes only if others have changed the session since the last call, as read.lua does.

local session, refusal = reconcile()
if not session then
  return refusal
end
local turn
turn, refusal = last_turn_of(session, ARGV[2] == '1')
if refusal then
  return refusal
end
take_note(session)
return seen(session, turn, tonumber(ARGV[1]))
