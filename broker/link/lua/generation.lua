-- Whose store this is, and whether it still is what the nodes know it to be (see generation.py).
--
-- KEYS  store, leases, nodes
-- ARGV  1 run id of the Redis that this node is connected to  2 this node
--       3 generation, 4 commits, 5 mark of the run, as this node knows them; '' for none
--       6 token for whatever must be made  7 '1' if this Redis cannot have lost anything
--       8 '1' if this node has seen that the store is behind  9 how long witnesses may take (ms)
--       10 '1' if it has just connected: only then is the run id sure to be of this very Redis
-- Answer: generation, commits, mark, how many witnesses have not come yet, why there is a new generation or ''
local store, node = KEYS[1], ARGV[2]
local held = redis.call('HMGET', store, 'generation', 'commits', 'run', 'mark', 'run_commits', 'run_since', 'witnesses')
local generation, commits = held[1], tonumber(held[2]) or 0
local run, mark, run_commits = held[3], held[4] or '', tonumber(held[5]) or 0
local since, waiting = tonumber(held[6]) or 0, held[7] or ''
local greeting = ARGV[10] == '1'
local token, why = ARGV[6], ''
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function without(names, gone)
  local rest = {}
  for name in string.gmatch(names, '%S+') do
    if name ~= gone then
      rest[#rest + 1] = name
    end
  end
  return rest
end

-- Nodes that may have been told of events which this run of Redis does not know.
local function witnesses()
  local names = {}
  for _, name in ipairs(without(table.concat(redis.call('ZRANGE', KEYS[2], 0, -1), ' '), node)) do
    local info = redis.call('HGET', KEYS[3], name)
    local read, fields = pcall(cjson.decode, info or '{}')
    if not (read and type(fields) == 'table' and fields.draining == true) then
      names[#names + 1] = name
    end
  end
  return names
end

if not generation then
  why = 'empty'
elseif not run then
  -- A publish has begun this generation, in a store that was emptied a moment ago.
  run, mark, run_commits, since = ARGV[1], token, commits, now
else
  if greeting and run ~= ARGV[1] then
    if waiting ~= '' then
      why = 'hurried' -- nobody can tell any more which run a late witness would speak of
    end
    run, mark, run_commits, since = ARGV[1], token, commits, now
    waiting = ARGV[7] == '1' and '' or table.concat(witnesses(), ' ')
  elseif greeting then
    waiting = table.concat(without(waiting, node), ' ')
  end
  if ARGV[3] == generation then
    -- Who has been here since this run began knows what it has stored itself.
    local bound = ARGV[5] == mark and commits or run_commits
    if ARGV[8] == '1' or tonumber(ARGV[4]) > bound then
      why = 'behind'
    end
  end
  if why == '' and waiting ~= '' and now - since >= tonumber(ARGV[9]) then
    why = 'silent'
  end
end
if why ~= '' then
  generation, waiting = token, ''
  run, mark, run_commits, since = ARGV[1], token, commits, now
end
redis.call('HSET', store, 'generation', generation, 'commits', string.format('%.0f', commits), 'run', run,
  'mark', mark, 'run_commits', string.format('%.0f', run_commits), 'run_since', string.format('%.0f', since),
  'witnesses', waiting)
return {generation, commits, mark, #without(waiting, ''), why}
