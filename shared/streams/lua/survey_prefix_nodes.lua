#!lua flags=allow-oom
-- Invariant: everything that is said of one node was true at one moment.
-- KEYS: index, leases. ARGV: cursor, fields to look at, prefixes of the nodes' children and of their
-- pins.
-- Returns {next cursor, nodes}: of each {name, parent, start, stop, bytes of its latents, bytes of
-- its snapshot, last use, last use of its snapshot, 1 if pinned, number of children}.
--include prefix_records
local index = KEYS[1]
local now = milliseconds()

local function count_children(name)
  local alive = 0
  for _, child in ipairs(redis.call('SMEMBERS', ARGV[3] .. name)) do
    alive = alive + redis.call('HEXISTS', index, 'node:' .. child)
  end
  return alive
end

local function survey(name, node)
  local snapshot, used, snapshot_used = unpack(redis.call('HMGET', index,
    'snapshot:' .. name, 'used:' .. name, 'snapshot-used:' .. name))
  local snapshot_bytes = 0
  for _, piece in ipairs(read_pieces(snapshot)) do
    snapshot_bytes = snapshot_bytes + piece.wire_bytes
  end
  return {name, node.parent, node.latents.start, node.latents.stop, node.latents.wire_bytes,
    snapshot_bytes, tonumber(used) or 0, tonumber(snapshot_used) or 0,
    holds_any_lease(KEYS[2], ARGV[4] .. name, now) and 1 or 0,
    count_children(name)}
end

local answer = redis.call('HSCAN', index, ARGV[1], 'MATCH', 'node:*', 'COUNT', ARGV[2])
local nodes = {}
for i = 1, #answer[2], 2 do
  local node = read_node(answer[2][i + 1])
  if node then nodes[#nodes + 1] = survey(string.sub(answer[2][i], 6), node) end
end
return {answer[1], nodes}
