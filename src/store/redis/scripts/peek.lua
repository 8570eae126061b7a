-- Tells how sessions look, for who wants to know whether others have changed them. Writes nothing.
--
-- The facts are part of it: whoever looks at a session saves what is new to them. So a change that
-- somebody saw, and that others took back before the next call of this, is one still.
--
-- KEYS: of each session the list, {K}:session and {K}:turns.
-- ARGV: none
--
-- Returns a text for each session, another one after a change.

local looks = {}
for index = 1, #KEYS, 3 do
  local length = redis.pcall('LLEN', KEYS[index])
  local facts = redis.pcall('HMGET', KEYS[index + 1], 'last', 'epoch')
  local turns = redis.pcall('HMGET', KEYS[index + 2], 'running', 'last_turn')
  local look = ''
  if type(length) == 'number' and length > 0 then
    local element = redis.call('LINDEX', KEYS[index], '0')
    look = length .. ':' .. redis.sha1hex(string.sub(element, 1, 256) .. string.sub(element, -256))
  end
  look = look .. ':' .. (facts[1] or '') .. ':' .. (facts[2] or '')
  looks[#looks + 1] = look .. ':' .. (turns[1] or '') .. ':' .. (turns[2] or '')
end
return looks
