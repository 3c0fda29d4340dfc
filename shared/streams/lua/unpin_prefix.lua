#!lua flags=allow-oom
-- Invariant: the nodes that a request pins and the requests that pin a node say the same.
-- KEYS: pins of the request. ARGV: request id, prefix of the nodes' pins.
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  redis.call('SREM', ARGV[2] .. name, ARGV[1])
end
return redis.call('UNLINK', KEYS[1])
