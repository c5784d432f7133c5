-- Store one event and tell every node of it; all or nothing.
--
-- KEYS  meta, stream, live channel; store, if there is one; once, if there is a key
-- ARGV  1 body  2 its time  3 session that must not get it, or ''  4 size of the stream
--       5 its life (ms)  6 token for whatever must be made  7 'SPUBLISH' in a Redis Cluster
--       8 now  9 for how long the key counts (s), '' without a key  10 '1' if replicas are waited for
--       11 who publishes: this node knows its own messages by it
-- Answer: epoch, offset, commits, 1 if it had been stored before
--
-- Whatever Redis may refuse (memory, disk, being a replica) it refuses at the
-- first command that writes, and never later: nothing is stored by halves.
local meta, stream = KEYS[1], KEYS[2]
local sharded = ARGV[7] == 'SPUBLISH'
local store = not sharded and KEYS[4]
local once = ARGV[9] ~= '' and KEYS[#KEYS]

if once then
  local first = redis.call('GET', once)
  if first then
    local offset, at, epoch = string.match(first, '^(%S+) (%S+) (%S+)$')
    if tonumber(at) > tonumber(ARGV[8]) - tonumber(ARGV[9]) then
      if ARGV[10] == '1' then
        -- WAIT looks at the last thing that its connection wrote, and the event may be another's.
        redis.call('PEXPIRE', once, redis.call('PTTL', once))
      end
      return {epoch, tonumber(offset), store and tonumber(redis.call('HGET', store, 'commits')) or 0, 1}
    end
  end
end

local found = redis.call('HMGET', meta, 'epoch', 'offset', 'ts')
local epoch, offset, ts = found[1], (tonumber(found[2]) or 0) + 1, ARGV[2]
if not epoch then
  redis.call('DEL', stream)
  epoch = ARGV[6]
elseif found[3] and tonumber(found[3]) > tonumber(ts) then
  ts = found[3] -- times never fall along a stream: they are searched by halves
end
local place = string.format('%.0f', offset)

local function add()
  if ARGV[3] == '' then
    return redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[4], place .. '-0', 'ts', ts, 'body', ARGV[1])
  end
  return redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[4], place .. '-0', 'ts', ts, 'body', ARGV[1], 'exclude', ARGV[3])
end
local added = add()
if type(added) == 'table' and added.err then
  if not string.find(added.err, 'equal or smaller', 1, true) then
    return added
  end
  -- The stream is ahead of its meta: they are not of one life.
  redis.call('DEL', stream)
  epoch = ARGV[6]
  add()
end
redis.call('HSET', meta, 'epoch', epoch, 'offset', place, 'ts', ts)
redis.call('PEXPIRE', stream, ARGV[5])
redis.call('PEXPIRE', meta, ARGV[5])

local commits, mark = 0, '-'
if store then
  local held = redis.call('HMGET', store, 'generation', 'mark')
  local generation = held[1]
  mark = held[2] or '-'
  if not generation then
    generation = ARGV[6]
    redis.call('HSET', store, 'generation', generation)
  end
  commits = redis.call('HINCRBY', store, 'commits', 1)
  epoch = epoch .. '.' .. generation
end
if once then
  -- A minute longer than it counts: whose clock counts is the broker's, not ours.
  redis.call('SET', once, place .. ' ' .. ARGV[8] .. ' ' .. epoch, 'PX', string.format('%.0f', ARGV[9] * 1000 + 60000))
end
local head = table.concat(
  {'d', epoch, place, ARGV[3] == '' and '-' or ARGV[3], string.format('%.0f', commits), mark, ARGV[11]}, ' ')
redis.call(sharded and 'SPUBLISH' or 'PUBLISH', KEYS[3], head .. '\n' .. ARGV[1])
return {epoch, offset, commits, 0}
