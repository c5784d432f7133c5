-- Everybody's acknowledged position: who, 'offset:ts', and so on.
--
-- KEYS  meta, seen
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch or redis.call('HGET', KEYS[2], '') ~= epoch then
  return {}
end
return redis.call('HGETALL', KEYS[2])
