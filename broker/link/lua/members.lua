-- A node tells what changed among its members of one room: keeps it, and tells the other nodes.
--
-- KEYS[1]  hash: session -> member, of this node in this room
-- KEYS[2]  hash: node -> version of its members here
-- KEYS[3]  the room's live channel
-- ARGV[1]  this node
-- ARGV[2]  version that this change follows, 0 where there were no members; '' to replace all
-- ARGV[3]  version after this change
-- ARGV[4]  how many members there were before it
-- ARGV[5]  forget everything unless it is said again within this time (ms)
-- ARGV[6]  PUBLISH or SPUBLISH
-- ARGV[7]  the message; '' for none
-- ARGV[8]  number n of members that came or changed; ARGV[9 .. 8+2n] pairs of session and member;
--          then the sessions that went
--
-- Returns 1, or 0 without doing anything where the store has not what this change follows.

local members, versions, channel = KEYS[1], KEYS[2], KEYS[3]
local node, after, version, before, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]

if after == '' then
  redis.call('DEL', members)
elseif (redis.call('HGET', versions, node) or '0') ~= after or redis.call('HLEN', members) ~= before then
  return 0
end
local first_gone = 9 + 2 * tonumber(ARGV[8])
for at = 9, first_gone - 1, 2 do
  redis.call('HSET', members, ARGV[at], ARGV[at + 1])
end
for at = first_gone, #ARGV do
  redis.call('HDEL', members, ARGV[at])
end
if redis.call('PEXPIRE', members, ttl) == 1 then
  redis.call('HSET', versions, node, version)
  redis.call('PEXPIRE', versions, ttl)
else
  redis.call('HDEL', versions, node)
end
if ARGV[7] ~= '' then
  redis.call(ARGV[6], channel, ARGV[7])
end
return 1
