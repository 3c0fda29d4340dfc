#!lua flags=allow-oom
-- Invariant: a state's segments, their index, its events, its pins and its lease go together; a
-- state that is deleted because nobody holds it is held by nobody at that moment.
-- KEYS: leases, index of the segments, prefill events, pins of the request. ARGV: request id, '1' to
-- keep a leased state, prefix of the pins of the prefix cache's nodes.
-- Returns the number of segments deleted, or -1 for a state that is kept.
if ARGV[2] == '1' then
  local now = redis.call('TIME')
  local expiry = redis.call('ZSCORE', KEYS[1], ARGV[1])
  if expiry and tonumber(expiry) > now[1] * 1000 + math.floor(now[2] / 1000) then return -1 end
end
local segments = redis.call('HKEYS', KEYS[2])
for _, segment in ipairs(segments) do redis.call('UNLINK', segment) end
for _, name in ipairs(redis.call('SMEMBERS', KEYS[4])) do
  redis.call('SREM', ARGV[3] .. name, ARGV[1])
end
redis.call('UNLINK', KEYS[2], KEYS[3], KEYS[4])
redis.call('ZREM', KEYS[1], ARGV[1])
return #segments
