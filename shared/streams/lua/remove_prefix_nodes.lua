#!lua flags=allow-oom
-- Invariant: a node leaves the index with its segments; one that is evicted is pinned by no request
-- that has a lease, and has no children.
-- KEYS: index, leases, counts. ARGV: '1' to evict, '0' to remove in any case, prefixes of the nodes'
-- children and of their pins, then names of nodes.
-- Returns {number of nodes removed, names of the children that they leave behind}.
--include prefix_records
local index, evict, children, pinned = KEYS[1], ARGV[1] == '1', ARGV[2], ARGV[3]
local now = milliseconds()

local function list_children(name)
  local alive = {}
  for _, child in ipairs(redis.call('SMEMBERS', children .. name)) do
    if redis.call('HEXISTS', index, 'node:' .. child) == 1 then alive[#alive + 1] = child end
  end
  return alive
end

local function remove_content(name, node)
  local segments = read_pieces(redis.call('HGET', index, 'snapshot:' .. name))
  segments[#segments + 1] = node.latents
  for _, segment in ipairs(segments) do
    redis.call('UNLINK', segment.key)
    redis.call('HDEL', index, 'segment:' .. segment.key)
    redis.call('HINCRBY', index, 'bytes', -segment.wire_bytes)
  end
  for _, block in ipairs(node.blocks) do
    if redis.call('HINCRBY', index, 'block:' .. block, -1) <= 0 then
      redis.call('HDEL', index, 'block:' .. block)
    end
  end
  redis.call('SREM', children .. node.parent, name)
end

local function remove(name, record)
  local node = read_node(record)
  if node then remove_content(name, node) end
  local snapshots = redis.call('HDEL', index, 'snapshot:' .. name)
  redis.call('HINCRBY', index, 'snapshots', -snapshots)
  redis.call('HINCRBY', index, 'nodes', -1)
  redis.call('HDEL', index, 'node:' .. name, 'used:' .. name, 'snapshot-used:' .. name)
  redis.call('UNLINK', children .. name, pinned .. name)
end

local removed, left = 0, {}
for i = 4, #ARGV do
  local name = ARGV[i]
  local record = redis.call('HGET', index, 'node:' .. name)
  local alive = record and list_children(name)
  if record and not (evict and (#alive > 0 or holds_any_lease(KEYS[2], pinned .. name, now))) then
    remove(name, record)
    removed = removed + 1
    for _, child in ipairs(alive) do left[#left + 1] = child end
  end
end
if evict and removed > 0 then redis.call('HINCRBY', KEYS[3], 'evicted_nodes', removed) end
return {removed, left}
