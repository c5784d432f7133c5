-- Say how many sessions a node has of some people in one room; learn who came to it and who has gone.
--
-- KEYS[1]  hash of the room: "<node>:<who>" -> sessions; an empty <who> counts everybody on that node
-- ARGV[1]  node that speaks, or that is spoken of
-- ARGV[2]  "some": ARGV holds pairs (who, sessions); "gone": the node has nobody here any more
-- ARGV[3]  expiry of the hash (ms), for rooms that nobody speaks of again
-- ARGV[4]  number n of nodes that have numbers here, ARGV[5 .. 4+n] their ids
-- then the pairs.
--
-- Returns pairs (who, 1 | -1): somebody who was nowhere and is here now, or the other way round.
local hash, node, mode = KEYS[1], ARGV[1], ARGV[2]
local writers = tonumber(ARGV[4])
local elsewhere = {}
for index = 5, 4 + writers do
  if ARGV[index] ~= node then
    elsewhere[#elsewhere + 1] = ARGV[index]
  end
end

local function held_by_others(who)
  if #elsewhere == 0 then
    return false
  end
  local fields = {}
  for index, other in ipairs(elsewhere) do
    fields[index] = other .. ':' .. who
  end
  for _, count in ipairs(redis.call('HMGET', hash, unpack(fields))) do
    if count then
      return true
    end
  end
  return false
end

local changes = {}
if mode == 'gone' then
  local prefix = node .. ':'
  for _, field in ipairs(redis.call('HKEYS', hash)) do
    if string.sub(field, 1, #prefix) == prefix then
      changes[#changes + 1] = { string.sub(field, #prefix + 1), 0 }
    end
  end
else
  for index = 5 + writers, #ARGV, 2 do
    changes[#changes + 1] = { ARGV[index], tonumber(ARGV[index + 1]) }
  end
end

local answer = {}
for _, change in ipairs(changes) do
  local who, count = change[1], change[2]
  local field = node .. ':' .. who
  local before = redis.call('HEXISTS', hash, field) == 1
  if count > 0 then
    redis.call('HSET', hash, field, count)
  else
    redis.call('HDEL', hash, field)
  end
  if before ~= (count > 0) and not held_by_others(who) then
    answer[#answer + 1] = who
    answer[#answer + 1] = count > 0 and 1 or -1
  end
end
redis.call('PEXPIRE', hash, ARGV[3])
return answer
