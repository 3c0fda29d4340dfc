#!lua flags=allow-oom
-- Invariant: all live workers around a region's states agree on the model and its state's shapes:
-- who comes first sets the terms, and they hold as long as anyone renews them.
-- KEYS: terms, codecs of readers. ARGV: terms, time to live in ms, codecs that the caller reads
-- ('' if it reads no states).
-- Returns the terms that hold.
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return held end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if ARGV[3] ~= '' then
  local now = redis.call('TIME')
  local expiry = now[1] * 1000 + math.floor(now[2] / 1000) + tonumber(ARGV[2])
  redis.call('ZADD', KEYS[2], 'GT', expiry, ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[2], 'NX')
  redis.call('PEXPIRE', KEYS[2], ARGV[2], 'GT')
end
return ARGV[1]
