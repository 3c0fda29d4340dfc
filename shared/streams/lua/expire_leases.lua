-- Invariant: a lease is taken away only after its time, judged by one clock, and by one caller.
-- KEYS: leases. ARGV: most leases to take. Returns the request ids whose states are to be deleted.
local now = redis.call('TIME')
local expired = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf',
  now[1] * 1000 + math.floor(now[2] / 1000), 'LIMIT', 0, ARGV[1])
if #expired > 0 then redis.call('ZREM', KEYS[1], unpack(expired)) end
return expired
