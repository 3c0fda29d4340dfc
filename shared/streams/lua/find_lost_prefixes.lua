#!lua flags=allow-oom
-- Invariant: a node is lost when its latents or its parent are gone, a snapshot when a piece is, and
-- either when its record is damaged.
-- KEYS: index. ARGV: cursor, fields to look at.
-- Returns {next cursor, {name, message} of all nodes seen, names of lost nodes, names of nodes whose
-- snapshot is lost}.
--include prefix_records
local index = KEYS[1]

local answer = redis.call('HSCAN', index, ARGV[1], 'MATCH', 'node:*', 'COUNT', ARGV[2])
local messages, nodes, snapshots = {}, {}, {}
for i = 1, #answer[2], 2 do
  local name, record = string.sub(answer[2][i], 6), answer[2][i + 1]
  local node, snapshot = read_node(record), redis.call('HGET', index, 'snapshot:' .. name)
  local pieces = read_pieces(snapshot)
  if node then messages[#messages + 1] = {name, node.message} end
  if not node or not is_intact(node.latents) or (node.latents.start ~= 0
      and redis.call('HEXISTS', index, 'node:' .. node.parent) == 0) then
    nodes[#nodes + 1] = name
  elseif snapshot and (#pieces == 0 or not are_intact(pieces)) then
    snapshots[#snapshots + 1] = name
  end
end
return {answer[1], messages, nodes, snapshots}
