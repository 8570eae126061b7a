-- The plain case of append.lua, which comes after it: a request that is new, without conditions, on a
-- session that nobody else has touched since its last element, and that has neither gaps nor an
-- expiry, by a server that trims nothing; of an element with an id that the server made, after
-- another such. What is up to LPUSH only reads: in any other case, the whole script goes on as if
-- nothing had been.
--
-- This is what most calls are, and worth a way of its own: Lua makes the functions of a script anew
-- at each call, and with all of them an Append costs Redis more than twice as much.

if ARGV[4] ~= '' and ARGV[5] == '' and #ARGV <= 1000 and not TTL_MS and not ELEMENTS_MAX then
  local facts = redis.pcall('HMGET', KEYS[2], 'day', 'mark', 'last', 'base')
  local last, base = tonumber(facts[3] or ''), tonumber(facts[4] or '')
  local has_older = facts[1] ~= ARGV[3]
  if last and base and (not has_older or facts[1] == ARGV[3] .. '+')
    and string.sub(facts[2] or '', 1, 3) == 'cm_'
    and redis.pcall('LLEN', KEYS[1]) == last - base
    and redis.call('PTTL', KEYS[1]) == -1
    and string.find(redis.call('LINDEX', KEYS[1], '0') or '', facts[2], 1, true)
  then
    local bucket = 3 + ARGV[3] % 2
    if redis.pcall('HGET', KEYS[bucket], ARGV[1]) == false
      and not (has_older and redis.pcall('HGET', KEYS[7 - bucket], ARGV[1]))
    then
      local first, count = last + 1, #ARGV - 5
      redis.call('LPUSH', KEYS[1], unpack(ARGV, 6))
      redis.call('HSET', KEYS[2], 'last', last + count, 'mark', ARGV[4])
      redis.call('HSET', KEYS[bucket], ARGV[1],
        count == 1 and ARGV[2] .. first or ARGV[2] .. first .. ':' .. count)
      redis.pcall('PUBLISH', '{' .. KEYS[1] .. '}:changed', '')
      return first
    end
  end
end

