-- Finds what an append stored. Writes nothing.
--
-- ARGV:
--   1  request id, 16 bytes
--   2  fingerprint of what was asked, 16 bytes
--
-- Returns, besides what common.lua says:
--   { 'repeated', record }
--   { 'reused' }              a call with this request id asked for something else
--   { 'unknown' }             there is none, or it is over 24 hours old, or was cleared

local session, refusal = reconcile()
if not session then
  return refusal
end
local record
record, refusal = recall(session, ARGV[1])
if refusal then
  return refusal
end
if not record then
  return { 'unknown' }
end
if string.sub(record, 1, 16) ~= ARGV[2] then
  return { 'reused' }
end
return { 'repeated', record }
