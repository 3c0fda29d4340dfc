#!lua flags=allow-oom
-- Invariant: only the attempt that owns a job ends it; a cancelled job stays cancelled. The entry
-- stays with its owner, for whatever has to be freed, until it is acknowledged.
-- KEYS: job stream, job record. ARGV: group, entry, worker, epoch, new state, time to live in ms.
-- Returns the state the job has now, or 'superseded'.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
local state, epoch, entry = unpack(redis.call('HMGET', KEYS[2], 'state', 'epoch', 'entry'))
if not pending or pending[2] ~= ARGV[3] or epoch ~= ARGV[4] or entry ~= ARGV[2] then
  return 'superseded'
end
if state == 'running' then
  state = ARGV[5]
  redis.call('HSET', KEYS[2], 'state', state)
end
redis.call('PEXPIRE', KEYS[2], ARGV[6])
return state
