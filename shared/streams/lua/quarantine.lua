#!lua flags=allow-oom
-- Invariant: a job reaches the dead letters once, by the hand of its owner. The entry stays with its
-- owner until it is acknowledged. A job whose failure was told to its client still belongs there.
-- KEYS: job stream, dead letters, job record (absent if the payload names no request).
-- ARGV: group, entry, worker, payload, reason, deliveries, most letters kept, time to live in ms.
-- Returns 'dead', the state of a job that had ended otherwise before, or 'superseded'.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
if not pending or pending[2] ~= ARGV[3] then return 'superseded' end
if KEYS[3] then
  local state, entry = unpack(redis.call('HMGET', KEYS[3], 'state', 'entry'))
  if entry ~= ARGV[2] then return 'superseded' end
  if state ~= 'queued' and state ~= 'running' and state ~= 'failed' then return state end
  redis.call('HSET', KEYS[3], 'state', 'dead')
  redis.call('PEXPIRE', KEYS[3], ARGV[8])
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[7], '*',
  'job', ARGV[4], 'reason', ARGV[5], 'deliveries', ARGV[6])
return 'dead'
