-- A node is no more: forget its members of one room.
--
-- KEYS[1]  hash: session -> member, of that node in this room
-- KEYS[2]  hash: node -> version of its members here
-- ARGV[1]  that node

redis.call('DEL', KEYS[1])
redis.call('HDEL', KEYS[2], ARGV[1])
return 1
