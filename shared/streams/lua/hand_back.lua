#!lua flags=allow-oom
-- Invariant: a job handed back is owned by nobody alive, so that any worker may claim it, and its
-- delivery count is what its worker says: an attempt that was no fault of the job does not count.
-- KEYS: job stream, job record. ARGV: group, entry, worker, epoch, nobody's name, deliveries.
-- Returns 'queued', or 'superseded'.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
local state, epoch = unpack(redis.call('HMGET', KEYS[2], 'state', 'epoch'))
if not pending or pending[2] ~= ARGV[3] or epoch ~= ARGV[4] then return 'superseded' end
if state == 'running' then redis.call('HSET', KEYS[2], 'state', 'queued') end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[2], 'RETRYCOUNT', ARGV[6], 'JUSTID')
return 'queued'
