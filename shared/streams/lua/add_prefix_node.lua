-- Invariant: a segment belongs to its request or to one node, and a node joins the index with its
-- parent there: it passes from one owner to the other in one step, or stays where it is.
-- KEYS: index, sign of life, segments of the request that it was written for, pins of the request.
-- ARGV: request id or '' to take a segment that no request owns, node, time to live in ms, prefixes
-- of the nodes' children and of their pins, part of the capacity that may be exceeded (1 / n).
-- Returns 'adopted', 'known', 'broken', 'closed', 'orphan', 'lost' or 'full'.
--include prefix_records
local index, request, record, ttl = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local node = cmsgpack.unpack(record)
local name, latents = node.blocks[#node.blocks], node.latents

local function hold()
  if request == '' then return end
  redis.call('SADD', ARGV[5] .. name, request)
  redis.call('PEXPIRE', ARGV[5] .. name, ttl)
  redis.call('SADD', KEYS[4], name)
  redis.call('PEXPIRE', KEYS[4], ttl)
end

local capacity = redis.call('GET', KEYS[2])
if not capacity then return 'closed' end
local known = redis.call('HGET', index, 'node:' .. name)
if known then
  local theirs = read_node(known)
  if not theirs or not is_intact(theirs.latents) then return 'broken' end
  hold()
  return 'known'
end
if latents.start ~= 0 then
  local parent = read_node(redis.call('HGET', index, 'node:' .. node.parent))
  if not parent or parent.latents.stop ~= latents.start then return 'orphan' end
end
local owned = redis.call('HEXISTS', KEYS[3], latents.key) == 1
local adopted = redis.call('HEXISTS', index, 'segment:' .. latents.key) == 1
if owned ~= (request ~= '') or adopted then return 'lost' end
if not is_intact(latents) then return 'lost' end
local bytes = tonumber(redis.call('HGET', index, 'bytes') or 0) + latents.wire_bytes
if bytes > capacity * (1 + 1 / ARGV[6]) then return 'full' end

redis.call('HDEL', KEYS[3], latents.key)
redis.call('PEXPIRE', latents.key, ttl)
redis.call('HSET', index, 'node:' .. name, record, 'segment:' .. latents.key, name,
  'used:' .. name, milliseconds())
for _, block in ipairs(node.blocks) do redis.call('HINCRBY', index, 'block:' .. block, 1) end
redis.call('HINCRBY', index, 'nodes', 1)
redis.call('HINCRBY', index, 'bytes', latents.wire_bytes)
redis.call('PEXPIRE', index, ttl)
if latents.start ~= 0 then
  redis.call('SADD', ARGV[4] .. node.parent, name)
  redis.call('PEXPIRE', ARGV[4] .. node.parent, ttl)
end
hold()
return 'adopted'
