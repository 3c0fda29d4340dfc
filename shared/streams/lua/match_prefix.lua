#!lua flags=allow-oom
-- Invariant: what a request is told of it also holds: nodes are found whole and pinned in one step.
-- KEYS: index, sign of life, counts, pins of the request. ARGV: request id or '' to look only, time
-- to live in ms, prefixes of the nodes' children and of their pins, then the names of the prompt's
-- whole blocks, shortest first.
-- Returns {reason, number of known blocks, nodes, hit, latents}: a node is {message, messages of its
-- snapshot's pieces}, and the last two are chains of positions in nodes, from their end to the root.
--include prefix_records
local index, request, ttl = KEYS[1], ARGV[1], ARGV[2]
local FIRST_NAME, MOST_BLOCKS = 5, 1024 -- of a node, of whose blocks at least the last is known

local function find_snapshot(name)
  local pieces = read_pieces(redis.call('HGET', index, 'snapshot:' .. name))
  return are_intact(pieces) and pieces or {}
end

local whole, found, known, longest, hit = {}, false, 0, nil, nil -- whole: by name
for first = FIRST_NAME, #ARGV, MOST_BLOCKS do
  local names = {unpack(ARGV, first, math.min(first + MOST_BLOCKS - 1, #ARGV))}
  local fields = {}
  for i, name in ipairs(names) do fields[i] = 'block:' .. name end
  for i, name in ipairs(names) do fields[#names + i] = 'node:' .. name end
  local values = redis.call('HMGET', index, unpack(fields))
  local known_before = known
  for i, name in ipairs(names) do
    if values[i] then known = first - FIRST_NAME + i end
    local record = values[#names + i]
    if record then
      found = true
      local node = read_node(record)
      if node and (node.latents.start == 0 or whole[node.parent]) and is_intact(node.latents) then
        whole[name] = {node = node, pieces = find_snapshot(name)}
        longest = name
        if #whole[name].pieces > 0 then hit = name end
      end
    end
  end
  if known == known_before then break end
end

local given, nodes = {}, {}
local function chain(name)
  local positions = {}
  while whole[name] do
    if not whole[name].position then
      local messages = {}
      for i, piece in ipairs(whole[name].pieces) do messages[i] = piece.message end
      given[#given + 1] = name
      nodes[#given] = {whole[name].node.message, messages}
      whole[name].position = #given
    end
    positions[#positions + 1] = whole[name].position
    name = whole[name].node.parent
  end
  return positions
end
local hit_chain = hit and chain(hit) or {}
local latents_chain = longest and chain(longest) or {}

local reason = 'unknown'
if hit then reason = 'hit'
elseif redis.call('EXISTS', KEYS[2]) == 0 then reason = 'closed'
elseif longest then reason = 'no_snapshot'
elseif found then reason = 'broken' end
if request == '' then return {reason, known, nodes, hit_chain, latents_chain} end

local now = milliseconds()

local function refresh(name) -- what a node owns, for which once in a while is enough
  redis.call('PEXPIRE', whole[name].node.latents.key, ttl)
  for _, piece in ipairs(whole[name].pieces) do redis.call('PEXPIRE', piece.key, ttl) end
  redis.call('PEXPIRE', ARGV[3] .. name, ttl)
end

for first = 1, #given, MOST_BLOCKS do
  local names = {unpack(given, first, math.min(first + MOST_BLOCKS - 1, #given))}
  local fields, uses = {}, {}
  for i, name in ipairs(names) do
    fields[i] = 'used:' .. name
    uses[2 * i - 1], uses[2 * i] = fields[i], now
    if redis.call('SADD', ARGV[4] .. name, request) == 1 then
      redis.call('PEXPIRE', ARGV[4] .. name, ttl)
    end
  end
  for i, used in ipairs(redis.call('HMGET', index, unpack(fields))) do
    if now - (tonumber(used) or 0) > ttl / 24 then refresh(names[i]) end
  end
  redis.call('HSET', index, unpack(uses))
  redis.call('SADD', KEYS[4], unpack(names))
end
redis.call('HINCRBY', KEYS[3], reason, 1)
if hit then
  redis.call('HSET', index, 'snapshot-used:' .. hit, now)
  redis.call('HINCRBY', KEYS[3], 'hit_tokens', whole[hit].node.latents.stop)
end
for _, key in ipairs({index, KEYS[3], KEYS[4]}) do redis.call('PEXPIRE', key, ttl) end
return {reason, known, nodes, hit_chain, latents_chain}
