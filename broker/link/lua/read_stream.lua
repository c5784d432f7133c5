-- Read a stream that one node at a time may read: keeps the lease, and reads only with it.
--   KEYS[1]  the stream      KEYS[2]  the lease
--   ARGV[1]  who             ARGV[2]  for how long (ms)
--   ARGV[3]  read what comes after this id
--   ARGV[4]  at most so many entries
--   ARGV[5]  at most so many bytes, but at least one entry
--   ARGV[6]  in place of an entry with more bytes than this stands its size
-- Answers {standing}, or {standing, entries in the stream, whether more follow, {{id, fields}, …}};
-- standing as in lease.lua.
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then
  return {0}
end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
local count, room, largest = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local found = redis.call('XRANGE', KEYS[1], '(' .. ARGV[3], '+', 'COUNT', count)
local entries = {}
for index, entry in ipairs(found) do
  local size = 0
  for _, text in ipairs(entry[2]) do
    size = size + #text
  end
  if size > largest then
    entry[2], size = size, 0
  end
  if size > room and index > 1 then
    break
  end
  room = room - size
  entries[index] = entry
end
return {holder and 2 or 1, redis.call('XLEN', KEYS[1]), (#found == count or #entries < #found) and 1 or 0, entries}
