#!lua flags=allow-oom
-- Invariant: the cache is open as long as its kv_store shows signs of life, also in a full store.
-- KEYS: sign of life. ARGV: capacity in bytes, time to live in ms.
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
