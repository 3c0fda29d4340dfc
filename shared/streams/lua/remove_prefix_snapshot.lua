#!lua flags=allow-oom
-- Invariant: a snapshot leaves its node with all its pieces; one that is evicted belongs to a node
-- that is pinned by no request that has a lease.
-- KEYS: index, leases, counts. ARGV: '1' to evict, '0' to remove in any case, prefix of the nodes'
-- pins, name of the node. Returns 1 if a snapshot was removed.
--include prefix_records
local index, pinned, name = KEYS[1], ARGV[2] .. ARGV[3], ARGV[3]
local snapshot = redis.call('HGET', index, 'snapshot:' .. name)
if not snapshot then return 0 end
if ARGV[1] == '1' then
  if holds_any_lease(KEYS[2], pinned, milliseconds()) then return 0 end
  redis.call('HINCRBY', KEYS[3], 'evicted_snapshots', 1)
end
for _, piece in ipairs(read_pieces(snapshot)) do
  redis.call('UNLINK', piece.key)
  redis.call('HDEL', index, 'segment:' .. piece.key)
  redis.call('HINCRBY', index, 'bytes', -piece.wire_bytes)
end
redis.call('HINCRBY', index, 'snapshots', -1)
redis.call('HDEL', index, 'snapshot:' .. name, 'snapshot-used:' .. name)
return 1
