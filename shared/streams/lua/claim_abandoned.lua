#!lua flags=allow-oom
-- Invariant: an entry changes hands only when its owner shows no sign of life, or when its owner is
-- the caller and does not run it. The latter was lost on its way, which is not held against the job.
-- KEYS: job stream. ARGV: group, caller, prefix of the keys of live workers, most entries to take,
-- then the entries that the caller runs.
-- Returns a list of {entry, payload, deliveries}.
local group, caller, alive, room = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local running = {}
for i = 5, #ARGV do running[ARGV[i]] = true end

local claimed = {}
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], group)
if consumers.err then return claimed end -- neither the stream nor its group is there
for _, fields in ipairs(consumers) do
  local consumer = {}
  for i = 1, #fields, 2 do consumer[fields[i]] = fields[i + 1] end
  local name = consumer.name
  local mine = name == caller
  if mine or redis.call('EXISTS', alive .. name) == 0 then
    if consumer.pending > 0 and room > 0 then
      -- One's own running entries may come first in the list, so it is read past them.
      local look = mine and (room + #ARGV) or room
      for _, pending in ipairs(redis.call('XPENDING', KEYS[1], group, '-', '+', look, name)) do
        local entry, deliveries = pending[1], pending[4]
        if room > 0 and not running[entry] then
          local count = mine and deliveries or deliveries + 1
          local taken =
            redis.call('XCLAIM', KEYS[1], group, caller, 0, entry, 'RETRYCOUNT', count)[1]
          if taken then
            running[entry] = true -- the caller may be listed after the consumer it came from
            local payload = ''
            for i = 1, #taken[2], 2 do
              if taken[2][i] == 'job' then payload = taken[2][i + 1] end
            end
            claimed[#claimed + 1] = {entry, payload, count}
            room = room - 1
          end
        end
      end
    elseif consumer.pending == 0 and not mine then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], group, name)
    end
  end
end
return claimed
