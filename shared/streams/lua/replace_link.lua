-- Invariant: an estimate follows from the one before it: it is written only if no other came between.
-- KEYS: link, links. ARGV: samples that the estimate before it was made of, time to live in ms, name
-- of the link, then its fields. Returns 1 if it was written.
if (redis.call('HGET', KEYS[1], 'samples') or '0') ~= ARGV[1] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
