-- An append in any case. All of common.lua comes before it, in a function that append.lua calls when
-- it first needs this.

return function(key, at, count)
  LIST, SESSION, TURNS = KEYS[key + 1], KEYS[key + 2], KEYS[key + 5]
  REQUESTS = { [0] = KEYS[key + 3], [1] = KEYS[key + 4] }
  local request, stamp, mark, condition = unpack(ARGV, at + 1, at + 4)

  local session, refusal = reconcile()
  if not session then
    return refusal
  end
  local record
  record, refusal = recall(session, request)
  if refusal then
    return refusal
  end
  if record then
    if not is_same(record, stamp) then
      return { 'reused' }
    end
    return { 'repeated', record }
  end
  local last, epoch = string.match(condition, '^(-?%d*),(-?%d*)$')
  if tonumber(epoch or '') and tonumber(epoch) ~= session.epoch then
    return { 'cleared' }
  end
  if tonumber(last or '') and tonumber(last) ~= session.last then
    return { 'mismatch', session.last }
  end

  local first = push(session, at + 6, at + 5 + count, mark)
  remember(session, request, stamp, first, count)
  ring()
  return first
end
