#!lua flags=allow-oom
-- Invariant: an entry leaves the stream by the hand of its owner, when nothing is left to do for it.
-- KEYS: job stream. ARGV: group, entry, worker.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
if not pending or pending[2] ~= ARGV[3] then return 0 end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
return redis.call('XDEL', KEYS[1], ARGV[2])
