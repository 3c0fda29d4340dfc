-- Invariant: a job leaves the stream for the dead letters in one step, by the hand of its owner.
-- KEYS: job stream, dead letters, job record (absent if the payload names no request).
-- ARGV: group, entry, worker, payload, reason, deliveries, most letters kept, time to live in ms.
-- A job whose failure was told to its client is failed by then, and still belongs there.
-- Returns 'dead', the state of a job that had ended otherwise before, or 'superseded'.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
local state, entry
if KEYS[3] then
  state, entry = unpack(redis.call('HMGET', KEYS[3], 'state', 'entry'))
  if not pending and state == 'dead' and entry == ARGV[2] then return state end
end
if not pending or pending[2] ~= ARGV[3] then return 'superseded' end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
if KEYS[3] then
  if entry ~= ARGV[2] then return 'superseded' end
  if state ~= 'queued' and state ~= 'running' and state ~= 'failed' then return state end
  redis.call('HSET', KEYS[3], 'state', 'dead')
  redis.call('PEXPIRE', KEYS[3], ARGV[8])
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[7], '*',
  'job', ARGV[4], 'reason', ARGV[5], 'deliveries', ARGV[6])
return 'dead'
