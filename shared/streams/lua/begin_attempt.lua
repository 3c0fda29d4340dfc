#!lua flags=allow-oom
-- Invariant: each attempt at a job has a higher epoch than all before it, and none begins for a job
-- that has ended or is owned by another worker.
-- KEYS: job stream, job record. ARGV: group, entry, worker, time to live in ms.
-- Returns {'begun', epoch, ms since the job was queued}, {'superseded'} or {'ended', state}.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
if not pending or pending[2] ~= ARGV[3] then return {'superseded'} end

local state, entry = unpack(redis.call('HMGET', KEYS[2], 'state', 'entry'))
if entry and entry ~= ARGV[2] then -- left by a job that was asked for again
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
  return {'superseded'}
end
if state ~= 'queued' and state ~= 'running' then return {'ended', state or 'expired'} end

local epoch = redis.call('HINCRBY', KEYS[2], 'epoch', 1)
redis.call('HSET', KEYS[2], 'state', 'running', 'worker', ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
local now = redis.call('TIME')
local queued = tonumber(string.match(ARGV[2], '^(%d+)-'))
return {'begun', epoch, math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - queued)}
