-- Tell the other nodes ephemeral events, and keep the newest of each slot.
--
-- KEYS[1]  hash: slot -> event
-- KEYS[2]  sorted set: the slots in the order in which they were filled
-- KEYS[3]  the room's live channel
-- ARGV[1]  PUBLISH or SPUBLISH
-- ARGV[2]  the message; empty: nobody needs to be told
-- ARGV[3]  how long the slots are kept after the last event (ms)
-- ARGV[4]  how many slots are kept
-- ARGV[5 ..]  pairs of slot and event, oldest first

local slots, order, channel = KEYS[1], KEYS[2], KEYS[3]
if redis.call('HLEN', slots) ~= redis.call('ZCARD', order) then
  redis.call('DEL', slots, order) -- Redis has evicted one of the two
end
local highest = redis.call('ZRANGE', order, -1, -1, 'WITHSCORES')[2]
local turn = tonumber(highest or '0')
for at = 5, #ARGV, 2 do
  turn = turn + 1
  redis.call('HSET', slots, ARGV[at], ARGV[at + 1])
  redis.call('ZADD', order, turn, ARGV[at])
end
local excess = redis.call('ZCARD', order) - tonumber(ARGV[4])
if excess > 0 then
  local oldest = redis.call('ZPOPMIN', order, excess)
  for at = 1, #oldest, 2 do
    redis.call('HDEL', slots, oldest[at])
  end
end
redis.call('PEXPIRE', slots, ARGV[3])
redis.call('PEXPIRE', order, ARGV[3])
if ARGV[2] == '' then
  return 0
end
return redis.call(ARGV[1], channel, ARGV[2])
