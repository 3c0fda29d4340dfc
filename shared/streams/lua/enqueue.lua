-- Invariant: a request has at most one entry in the stream, and a full stream takes none.
-- KEYS: job stream, job record. ARGV: payload, backlog limit, time to live in ms.
-- Returns {'queued'}, {'known', state} or {'full', backlog}.
local state = redis.call('HGET', KEYS[2], 'state')
if state then return {'known', state} end
local backlog = redis.call('XLEN', KEYS[1])
if backlog >= tonumber(ARGV[2]) then return {'full', backlog} end
local entry = redis.call('XADD', KEYS[1], '*', 'job', ARGV[1])
redis.call('HSET', KEYS[2], 'state', 'queued', 'entry', entry)
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return {'queued'}
