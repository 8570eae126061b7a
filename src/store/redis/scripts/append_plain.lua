-- The plain case of an append: a request that is new, without conditions, on a session that nobody
-- else has touched since its last element, and that has neither gaps nor an expiry, by a server that
-- trims nothing; of an element with an id that the server made, after another such; where today's records
-- are there, with their expiry.
--
-- This is what most calls are, and worth a way of its own: Lua makes the functions of common.lua anew
-- at each call of a script, and with all of them an Append costs Redis more than twice as much.

-- Appends, and returns the first sequence; or nil, if this is another case: then nothing has happened.
-- The keys begin after KEYS[key], the arguments after ARGV[at]: append.lua says which these are. The
-- record is the first write, and so what Redis refuses if it takes none.
local function append_plain(key, at, count)
  local day, mark = ARGV[1], ARGV[at + 3]
  if mark == '' or ARGV[at + 4] ~= '' or count > 1000 or TTL_MS or ELEMENTS_MAX then
    return nil
  end
  local list, session = KEYS[key + 1], KEYS[key + 2]
  local facts = redis.pcall('HMGET', session, 'day', 'mark', 'last', 'base')
  local last, base = tonumber(facts[3] or ''), tonumber(facts[4] or '')
  local has_older = facts[1] ~= day
  local bucket, request = key + 3 + day % 2, ARGV[at + 1]
  if not (last and base and (not has_older or facts[1] == day .. '+')
    and string.sub(facts[2] or '', 1, 3) == 'cm_'
    and redis.pcall('LLEN', list) == last - base
    and redis.call('PTTL', list) == -1
    and redis.call('PTTL', KEYS[bucket]) > 0
    and string.find(redis.call('LINDEX', list, '0') or '', facts[2], 1, true)
    and not (has_older and redis.pcall('HGET', KEYS[key * 2 + 7 - bucket], request)))
  then
    return nil
  end

  -- Lua writes its own numbers as fractions, if need be: that takes longer.
  local newest = string.format('%d', last + count)
  local record = ARGV[at + 2] .. newest
  if count ~= 1 then
    -- A format of Lua's would end the stamp at a zero byte.
    record = ARGV[at + 2] .. string.format('%d:%d', last + 1, count)
  end
  if redis.pcall('HSETNX', KEYS[bucket], request, record) ~= 1 then
    return nil
  end
  local length = redis.pcall('LPUSH', list, unpack(ARGV, at + 6, at + 5 + count))
  if type(length) ~= 'number' then
    redis.pcall('HDEL', KEYS[bucket], request)
    return nil
  end
  redis.call('HSET', session, 'last', newest, 'mark', mark)
  redis.pcall('PUBLISH', '{' .. list .. '}:changed', '')
  return last + 1
end
