-- Set aside what could not be used, once, however many nodes say so.
--   KEYS[1]  stream of the rejected      KEYS[2]  mark of this one
--   ARGV[1]  length of the stream        ARGV[2]  life of the mark (ms)
--   ARGV[3…] fields of the entry
-- Answers 1, or 0 when another node was first.
if not redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[2]) then
  return 0
end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, 3))
return 1
