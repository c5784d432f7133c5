-- Where many streams are. Writes nothing. Not for a Redis Cluster: see proof.lua.
--
-- KEYS  metas
-- ARGV  the store's hash
-- Answer: generation, commits, then epoch (without the generation) and offset of each; nil where there is none
--
-- The hash comes as an argument so that KEYS are the metas and nothing else; a
-- Redis that is no Cluster does not mind.
local held = redis.call('HMGET', ARGV[1], 'generation', 'commits')
local answer = {held[1], tonumber(held[2]) or 0}
for _, meta in ipairs(KEYS) do
  local found = redis.call('HMGET', meta, 'epoch', 'offset')
  answer[#answer + 1] = found[1]
  answer[#answer + 1] = tonumber(found[2]) or 0
end
return answer
