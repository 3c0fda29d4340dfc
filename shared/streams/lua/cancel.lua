#!lua flags=allow-oom
-- Invariant: cancelling is final and may come at any time, twice, or before the job itself.
-- KEYS: job stream, job record, leases of states. ARGV: group, time to live in ms, request id.
-- Returns the state before: a running job is left to its worker, which sees the cancellation. The
-- state that a job has published is left to nobody: its lease ends.
local state, entry = unpack(redis.call('HMGET', KEYS[2], 'state', 'entry'))
if state == 'done' then redis.call('ZADD', KEYS[3], 'XX', 0, ARGV[3]) end
if state and state ~= 'queued' and state ~= 'running' then return state end
redis.call('HSET', KEYS[2], 'state', 'cancelled')
redis.call('PEXPIRE', KEYS[2], ARGV[2])
if state == 'queued' then
  redis.call('XACK', KEYS[1], ARGV[1], entry)
  redis.call('XDEL', KEYS[1], entry)
end
return state or 'unknown'
