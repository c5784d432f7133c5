-- Take or keep a lease, or give it back; the time is that of Redis alone.
--   KEYS[1]  the lease       ARGV[1]  who       ARGV[2]  for how long (ms); 0 gives it back
-- Answers 2 when it was theirs before, 1 when it was free, 0 when it is somebody else's.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
if ARGV[2] == '0' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return holder and 2 or 1
