-- Move acknowledged positions forward, never back.
--
-- KEYS  meta, seen
-- ARGV  1 life (ms)  then who, offset, ts of each
-- Answer: how many have moved
--
-- The field '' holds the epoch that the positions belong to: a new stream begins without any.
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then
  return 0
end
if redis.call('HGET', KEYS[2], '') ~= epoch then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[2], '', epoch)
end
local moved = 0
for i = 2, #ARGV, 3 do
  local known = redis.call('HGET', KEYS[2], ARGV[i])
  if not known or tonumber(string.match(known, '^%d+')) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1] .. ':' .. ARGV[i + 2])
    moved = moved + 1
  end
end
redis.call('PEXPIRE', KEYS[2], ARGV[1])
return moved
