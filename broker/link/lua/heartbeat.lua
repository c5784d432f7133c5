-- A node says that it is alive, and hears who else is. Time is that of Redis alone.
--
-- KEYS[1]  sorted set: node by the time (ms) at which its lease ends
-- KEYS[2]  hash: node -> what it says of itself
-- KEYS[3]  hash: last (time of the last heartbeat of any node), began (see below)
-- ARGV[1]  id of this node
-- ARGV[2]  'first': take a lease; 'keep': renew it; 'part': the same, for the last time;
--          'look': only hear of the others; 'end': the same, and let them hear what ARGV[4] says
-- ARGV[3]  length of the lease (ms)
-- ARGV[4]  what this node says of itself (JSON)
-- ARGV[5]  the usual length of a lease (ms)
--
-- Returns 0 if others have declared this node dead, 1 if all is as it was, 2 if the store had
-- forgotten the node; whether absence counts; the nodes whose leases have ended and which are
-- told in this answer and in no other; pairs of node and what it says of itself, if that is known.
--
-- Where nobody was heard of for half a lease, it was Redis that was away, or the whole cluster:
-- everybody gets time to come back, and until then absence counts for nothing. The same holds
-- after Redis has lost what it knew.

local leases, nodes, beats = KEYS[1], KEYS[2], KEYS[3]
local id, mode, length, info, usual = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local last = tonumber(redis.call('HGET', beats, 'last') or '0')
local began = tonumber(redis.call('HGET', beats, 'began') or '0')
if now - last > usual / 2 then
  began = now
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now + usual)) do
    redis.call('ZADD', leases, now + usual, other)
  end
end

local status = 1
local known = redis.call('ZSCORE', leases, id)
if mode == 'keep' and not known then
  if redis.call('EXISTS', leases) == 0 then
    began = now
  elseif now - began > usual then
    return {0, 0, {}, {}}
  end
  status = 2
end
redis.call('HSET', beats, 'last', now, 'began', began)
local settled = now - began > usual
if mode == 'first' or mode == 'keep' or (mode == 'part' and known) then
  redis.call('ZADD', leases, now + length, id)
  redis.call('HSET', nodes, id, info)
elseif mode == 'end' and known then
  redis.call('HSET', nodes, id, info)
end

local ended = redis.call('ZRANGEBYSCORE', leases, '-inf', now)
if settled then
  for _, other in ipairs(redis.call('HKEYS', nodes)) do
    if not redis.call('ZSCORE', leases, other) then
      ended[#ended + 1] = other
    end
  end
end
for _, other in ipairs(ended) do
  redis.call('ZREM', leases, other)
  redis.call('HDEL', nodes, other)
end
local listing = {}
for _, other in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
  listing[#listing + 1] = other
  listing[#listing + 1] = redis.call('HGET', nodes, other) or ''
end
return {status, settled and 1 or 0, ended, listing}
