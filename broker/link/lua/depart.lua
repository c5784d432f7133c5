-- Note departures that become true after the grace time.
--
-- KEYS[1]  the sorted set of departures
-- ARGV[1]  grace (ms), ARGV[2 ..] the departures
local now = redis.call('TIME')
local due = now[1] * 1000 + math.floor(now[2] / 1000) + tonumber(ARGV[1])
for index = 2, #ARGV do
  redis.call('ZADD', KEYS[1], due, ARGV[index])
end
return #ARGV - 1
