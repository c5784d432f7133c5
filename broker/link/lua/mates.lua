-- Who is in a room, by node.
--
-- KEYS[1]  hash: node -> version of its members here
-- KEYS[2]  what the keys of members in this room begin with; the node's id follows
-- ARGV     nodes to read; none for all
--
-- Returns a list of node, version, list of session and member, node, version, ...

local answer = {}
local nodes = #ARGV > 0 and ARGV or redis.call('HKEYS', KEYS[1])
for _, node in ipairs(nodes) do
  local version = redis.call('HGET', KEYS[1], node)
  if version then
    answer[#answer + 1] = node
    answer[#answer + 1] = version
    answer[#answer + 1] = redis.call('HGETALL', KEYS[2] .. node)
  end
end
return answer
