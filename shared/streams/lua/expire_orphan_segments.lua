#!lua flags=allow-oom
-- Invariant: a segment that neither a node, nor the request that it was written for, nor a lease of
-- that request knows is given a last time to live, once.
-- KEYS: index, leases. ARGV: that time in ms, then for each segment: key, segments of its request,
-- request id. Returns the number of segments that were given it now.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local orphans = 0
for i = 2, #ARGV, 3 do
  local segment, owned, request = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local expiry = tonumber(redis.call('ZSCORE', KEYS[2], request) or 0)
  if expiry <= now and redis.call('HEXISTS', owned, segment) == 0
      and redis.call('HEXISTS', KEYS[1], 'segment:' .. segment) == 0 then
    orphans = orphans + redis.call('PEXPIRE', segment, ARGV[1], 'LT')
  end
end
return orphans
