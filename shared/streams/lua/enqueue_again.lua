-- Invariant: a job that is asked for again replaces its former entry, keeps its epoch counter, and
-- a cancelled one stays cancelled.
-- KEYS: job stream, job record. ARGV: group, payload, time to live in ms, an epoch that the
-- next attempt must exceed even if the record was lost.
-- Returns {'queued'} or {'ended', state}.
local state, entry, epoch = unpack(redis.call('HMGET', KEYS[2], 'state', 'entry', 'epoch'))
if state == 'cancelled' or state == 'failed' or state == 'dead' then return {'ended', state} end
if entry then
  redis.call('XACK', KEYS[1], ARGV[1], entry)
  redis.call('XDEL', KEYS[1], entry)
end
local added = redis.call('XADD', KEYS[1], '*', 'job', ARGV[2])
redis.call('HSET', KEYS[2], 'state', 'queued', 'entry', added,
  'epoch', math.max(tonumber(epoch or 0), tonumber(ARGV[4])))
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return {'queued'}
