-- Invariant: only the attempt that owns a job ends it; a cancelled job stays cancelled; repeating a
-- call whose answer was lost changes nothing.
-- KEYS: job stream, job record. ARGV: group, entry, worker, epoch, new state, time to live in ms.
-- Returns the state the job has now, or 'superseded'.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
local state, epoch, entry = unpack(redis.call('HMGET', KEYS[2], 'state', 'epoch', 'entry'))
local ended = state ~= 'queued' and state ~= 'running'
if not pending and epoch == ARGV[4] and entry == ARGV[2] and ended then return state end
if not pending or pending[2] ~= ARGV[3] or epoch ~= ARGV[4] or entry ~= ARGV[2] then
  return 'superseded'
end
if state == 'running' then
  state = ARGV[5]
  redis.call('HSET', KEYS[2], 'state', state)
end
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return state
