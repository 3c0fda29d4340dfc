#!lua flags=allow-oom
-- Invariant: a codec is written only if every reader that shows a sign of life can read it.
-- KEYS: codecs of readers. Returns one list of codecs for each kind of reader that is alive.
local now = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1],
  now[1] * 1000 + math.floor(now[2] / 1000), '+inf')
