#!lua flags=allow-oom
-- Invariant: a lease that has run out is never revived; who held it must treat the state as lost.
-- KEYS: leases. ARGV: lease in ms, '1' to open a lease that may be new, then request ids.
-- Returns the request ids whose lease is gone.
local now = redis.call('TIME')
local expiry = now[1] * 1000 + math.floor(now[2] / 1000) + tonumber(ARGV[1])
local gone = {}
for i = 3, #ARGV do
  if ARGV[2] == '1' or redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    redis.call('ZADD', KEYS[1], expiry, ARGV[i])
  else
    gone[#gone + 1] = ARGV[i]
  end
end
return gone
