-- What scripts read of the prefix cache's records. One that is damaged is nil: it is treated as gone.

local function unpacked(record)
  local ok, value = pcall(cmsgpack.unpack, record)
  return ok and type(value) == 'table' and value or nil
end

local function is_segment(value)
  return type(value) == 'table' and type(value.key) == 'string'
    and type(value.start) == 'number' and type(value.stop) == 'number'
    and type(value.wire_bytes) == 'number'
end

local function read_node(record)
  local node = record and unpacked(record)
  if node and is_segment(node.latents) and type(node.parent) == 'string'
      and type(node.blocks) == 'table' and type(node.blocks[#node.blocks]) == 'string'
      and type(node.message) == 'string' then
    return node
  end
end

local function read_pieces(record) -- of a snapshot; none if there is none, or a damaged one
  local pieces = record and unpacked(record) or {}
  for _, piece in ipairs(pieces) do
    if not is_segment(piece) or type(piece.message) ~= 'string' then return {} end
  end
  return pieces
end

local function is_intact(segment)
  return redis.call('STRLEN', segment.key) == segment.wire_bytes
end

local function are_intact(segments)
  for _, segment in ipairs(segments) do
    if not is_intact(segment) then return false end
  end
  return true
end

local function holds_any_lease(leases, pins, now)
  for _, request in ipairs(redis.call('SMEMBERS', pins)) do
    local expiry = redis.call('ZSCORE', leases, request)
    if expiry and tonumber(expiry) > now then return true end
  end
  return false
end

local function milliseconds()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
