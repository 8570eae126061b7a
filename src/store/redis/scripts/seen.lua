-- What the scripts that tell of a session begin with, after turns.lua.
--
-- Seen, in replies:
--
--   { 'seen', count, first, last, epoch, floor, title, metadata, ttl, origin, expires_at, turn,
--     version }
--     first, last        sequences; 0 if there are none
--     floor              the greatest sequence of an element at or before one asked for; 0 if there
--                        is none
--     title … origin     as they were set; '' if they were not
--     expires_at         '' if the list does not expire
--     turn               that which runs, or else the last: { turn, name, attempt, state, request },
--                        the request '' unless it was asked for and the turn has not completed; ''
--                        if there is none
--     version            of the metadata; 0 if they have none

-- The turn to tell of. Returns nil and what the script must return if that could not be found out.
local function last_turn_of(session, with_request)
  local values, refusal = fields('running', 'last_turn')
  if not values then
    return nil, refusal
  end
  local turn = not session.is_cleared and values[1] or ''
  local record = turn ~= '' and known(redis.call('HGET', TURNS, turn), session.now)
  if not record and not session.is_cleared and values[2] then
    turn = redis.call('HGET', TURNS, ordinal_field(tonumber(values[2])))
    record = turn and known(redis.call('HGET', TURNS, turn), session.now)
  end
  -- The messages of one that has completed have gone with a list that expired.
  if not record or session.has_expired and record.state == 'completed' then
    return ''
  end
  local request = with_request and record.state ~= 'completed'
    and redis.call('HGET', TURNS, request_field(turn))
  return { turn, record.name, record.attempt, state_of(record, session.now), request or '' }
end

-- Gives the metadata, which have changed, their next version.
local function raise_version(session)
  local version = tonumber(redis.call('HGET', SESSION, 'version') or '') or 0
  redis.call('HSET', SESSION, 'version', decimal(math.max(version + 1, session.now)))
end

local function seen(session, turn, at)
  local facts = redis.call('HMGET', SESSION, 'title', 'metadata', 'ttl', 'origin', 'version')
  if session.is_cleared or session.has_expired then
    -- They may be there still, if Redis refuses writes.
    facts = {}
  end
  local first, floor = 0, 0
  if session.length > 0 then
    first = sequence_at(session, session.base + 1)
    local place = math.min(place_at(session, at), session.base + session.length)
    if place > session.base then
      floor = sequence_at(session, place)
    end
  end
  return { 'seen', session.length, first, session.last, session.epoch, floor,
    facts[1] or '', facts[2] or '', facts[3] or '', facts[4] or '', session.expires_at or '', turn,
    tonumber(facts[5] or '') or 0 }
end
