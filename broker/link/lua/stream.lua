-- Put in front of the scripts of a room's stream (see stream_scripts.py).

-- The room's epoch and newest offset. A room without meta gets one: 'token' is
-- its new epoch, and whatever an earlier life left behind goes away, so that old
-- offsets never stand over a new stream. 'life' (ms) only collects garbage.
local function ensure(meta, stream, token, life)
  local found = redis.call('HMGET', meta, 'epoch', 'offset')
  if found[1] then
    return found[1], tonumber(found[2])
  end
  redis.call('DEL', stream)
  redis.call('HSET', meta, 'epoch', token, 'offset', 0)
  redis.call('PEXPIRE', meta, life)
  return token, 0
end

-- The epoch as clients see it, and how much the store has stored. A Redis
-- Cluster gives no 'store': its scripts cannot reach one from every room.
local function told(epoch, store, token)
  if not store then
    return epoch, 0
  end
  local found = redis.call('HMGET', store, 'generation', 'commits')
  if not found[1] then
    redis.call('HSET', store, 'generation', token, 'commits', 0)
    return epoch .. '.' .. token, 0
  end
  return epoch .. '.' .. found[1], tonumber(found[2])
end
