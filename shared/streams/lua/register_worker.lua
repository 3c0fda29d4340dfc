#!lua flags=allow-oom
-- Invariant: a worker that shows a sign of life is a consumer of the group, also right after Redis
-- lost its data. The group starts at 0: jobs queued before any worker came are delivered too.
-- KEYS: job stream, worker's sign of life. ARGV: group, worker, registration, time to live in ms.
local created = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if created.err and not string.find(created.err, '^BUSYGROUP') then return created end
redis.call('XGROUP', 'CREATECONSUMER', KEYS[1], ARGV[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4])
return redis.status_reply('OK')
