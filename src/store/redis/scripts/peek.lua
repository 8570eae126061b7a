-- Tells how sessions look, for who wants to know whether others have changed them. Writes nothing.
--
-- KEYS: of each session the list and {K}:turns.
-- ARGV: none
--
-- Returns a text for each session, another one after a change.

local looks = {}
for index = 1, #KEYS, 2 do
  local length = redis.pcall('LLEN', KEYS[index])
  local turns = redis.pcall('HMGET', KEYS[index + 1], 'running', 'last_turn')
  local look = ''
  if type(length) == 'number' and length > 0 then
    local element = redis.call('LINDEX', KEYS[index], '0')
    look = length .. ':' .. redis.sha1hex(string.sub(element, 1, 256) .. string.sub(element, -256))
  end
  looks[#looks + 1] = look .. ':' .. (turns[1] or '') .. ':' .. (turns[2] or '')
end
return looks
