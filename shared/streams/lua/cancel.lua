-- Invariant: cancelling is final and may come at any time, twice, or before the job itself.
-- KEYS: job stream, job record. ARGV: group, time to live in ms.
-- Returns the state before: a running job is left to its worker, which sees the cancellation.
local state, entry = unpack(redis.call('HMGET', KEYS[2], 'state', 'entry'))
if state and state ~= 'queued' and state ~= 'running' then return state end
redis.call('HSET', KEYS[2], 'state', 'cancelled')
redis.call('PEXPIRE', KEYS[2], ARGV[2])
if state == 'queued' then
  redis.call('XACK', KEYS[1], ARGV[1], entry)
  redis.call('XDEL', KEYS[1], entry)
end
return state or 'unknown'
