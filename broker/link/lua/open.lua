-- Where a room's stream is; it is made if there is none.
--
-- KEYS  meta, stream; store, if there is one
-- ARGV  1 token for whatever must be made  2 life (ms)
-- Answer: epoch, offset, commits
local epoch, offset = ensure(KEYS[1], KEYS[2], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
local shown, commits = told(epoch, KEYS[3], ARGV[1])
return {shown, offset, commits}
