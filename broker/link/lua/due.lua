-- Take what is due from a sorted set of departures: each is given to one caller only.
--
-- KEYS[1]  the sorted set: departure by the time at which it becomes true (ms)
-- ARGV[1]  how many at most
local now = redis.call('TIME')
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now[1] * 1000 + math.floor(now[2] / 1000), 'LIMIT', 0, ARGV[1])
if #due > 0 then
  redis.call('ZREM', KEYS[1], unpack(due))
end
return due
