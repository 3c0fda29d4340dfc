#!lua flags=allow-oom
-- Invariant: only the running attempt with the highest epoch announces anything of a prefill.
-- KEYS: job record, prefill events. ARGV: epoch, event, time to live in ms.
-- Returns 'ok', 'superseded' or the state in which the job has ended.
local state, epoch = unpack(redis.call('HMGET', KEYS[1], 'state', 'epoch'))
if epoch ~= ARGV[1] or state == 'queued' then return 'superseded' end
if state ~= 'running' then return state end
redis.call('XADD', KEYS[2], '*', 'event', ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 'ok'
