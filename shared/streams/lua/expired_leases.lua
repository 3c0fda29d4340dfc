#!lua flags=allow-oom
-- Invariant: whether a lease has run out is judged by one clock, that of Redis.
-- KEYS: leases. ARGV: most to name. Returns the request ids whose lease has run out.
local now = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf',
  now[1] * 1000 + math.floor(now[2] / 1000), 'LIMIT', 0, ARGV[1])
