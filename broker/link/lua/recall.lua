-- The newest event of each slot, oldest first.
--
-- KEYS[1]  hash: slot -> event
-- KEYS[2]  sorted set: the slots in the order in which they were filled

local events = {}
for _, slot in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  events[#events + 1] = redis.call('HGET', KEYS[1], slot)
end
return events
