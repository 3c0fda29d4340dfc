-- Invariant: all pieces of a snapshot pass from their request to a node that has none, or none does.
-- KEYS: index, sign of life, segments of the request that it was written for, pins of the request.
-- ARGV: request id or '' to take segments that no request owns, pieces, time to live in ms, prefix
-- of the nodes' pins, part of the capacity that may be exceeded (1 / n), name of the node.
-- Returns 'adopted', 'known', 'broken', 'closed', 'orphan', 'lost' or 'full'.
--include prefix_records
local index, request, ttl, name = KEYS[1], ARGV[1], ARGV[3], ARGV[6]
local capacity = redis.call('GET', KEYS[2])
if not capacity then return 'closed' end
local node = read_node(redis.call('HGET', index, 'node:' .. name))
if not node then return 'orphan' end
local known = redis.call('HGET', index, 'snapshot:' .. name)
if known then
  local theirs = read_pieces(known)
  return #theirs > 0 and are_intact(theirs) and 'known' or 'broken'
end

local pieces, bytes = cmsgpack.unpack(ARGV[2]), 0
for _, piece in ipairs(pieces) do
  if piece.stop ~= node.latents.stop then return 'orphan' end
  local owned = redis.call('HEXISTS', KEYS[3], piece.key) == 1
  local adopted = redis.call('HEXISTS', index, 'segment:' .. piece.key) == 1
  if owned ~= (request ~= '') or adopted then return 'lost' end
  if not is_intact(piece) then return 'lost' end
  bytes = bytes + piece.wire_bytes
end
if tonumber(redis.call('HGET', index, 'bytes') or 0) + bytes > capacity * (1 + 1 / ARGV[5]) then
  return 'full'
end

for _, piece in ipairs(pieces) do
  redis.call('HDEL', KEYS[3], piece.key)
  redis.call('PEXPIRE', piece.key, ttl)
  redis.call('HSET', index, 'segment:' .. piece.key, name)
end
redis.call('HSET', index, 'snapshot:' .. name, ARGV[2],
  'snapshot-used:' .. name, milliseconds())
redis.call('HINCRBY', index, 'snapshots', 1)
redis.call('HINCRBY', index, 'bytes', bytes)
redis.call('PEXPIRE', index, ttl)
if request ~= '' then
  redis.call('SADD', ARGV[4] .. name, request)
  redis.call('PEXPIRE', ARGV[4] .. name, ttl)
  redis.call('SADD', KEYS[4], name)
  redis.call('PEXPIRE', KEYS[4], ttl)
end
return 'adopted'
