-- Give a room of a Redis Cluster another epoch, because its stream has lost its tail.
--
-- KEYS  meta
-- ARGV  1 the epoch that nobody may go on with  2 token for the new one
-- Answer: 1 if it was renewed by this call
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[2])
return 1
