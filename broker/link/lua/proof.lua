-- Where a room's stream is, and which event it has at one place. Writes nothing.
--
-- KEYS  meta, stream
-- ARGV  1 offset of that place
-- Answer: epoch, offset, digest of the event's body; nil where there is none
local found = redis.call('HMGET', KEYS[1], 'epoch', 'offset')
local place = ARGV[1] .. '-0'
local entry = redis.call('XRANGE', KEYS[2], place, place)[1]
return {found[1], tonumber(found[2]) or 0, entry and entry[2][4] and redis.sha1hex(entry[2][4]) or false}
