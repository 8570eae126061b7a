-- What all scripts on a session have in common; keys.lua comes before it. Lua makes these functions
-- anew at each call of a script: what only some of them need is in common.lua and turns.lua.

local function decimal(number)
  return string.format('%.0f', number)
end

-- What the script must return if this reply of redis.pcall is an error; nil if it is none.
local function refusal_of(reply, key)
  if type(reply) ~= 'table' or not reply.err then
    return nil
  end
  if string.find(reply.err, 'WRONGTYPE', 1, true) then
    return { 'wrong type', key }
  end
  return redis.error_reply(reply.err)
end

-- Now, in ms since 1970.
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Lets a key expire in `left` ms, if it exists: at once if there is nothing left, and else up to a
-- second late, but never early. Writes only what makes a difference, since every write goes to the
-- replicas and the log. What it has may be known.
local function expire_in(key, left, has)
  has = has or redis.call('PTTL', key)
  local late = math.min(500, left / 100)
  if has ~= -2 and (has < left or has > left + 2 * late) then
    redis.call('PEXPIRE', key, decimal(left + late))
  end
end

-- The fields of {K}:turns that turns.lua describes.
local function chunk_field(turn, index)
  return turn .. 'chunk:' .. decimal(index)
end

local function ordinal_field(ordinal)
  return 'turn:' .. decimal(ordinal)
end

-- Tells those who watch the session that it has changed. A user who may not is left to those who
-- look by themselves. The last command of a script: what was written stays written.
local function ring()
  redis.pcall('PUBLISH', '{' .. LIST .. '}:changed', '')
end
