#!lua flags=allow-oom
-- Invariant: each token index of a request is emitted once, by the attempt with the highest epoch,
-- to the gateway's stream and to the request's log in one step; repeating a call changes nothing.
-- KEYS: gateway's token stream, gateway's sign of life, then for each event: job record, token log.
-- ARGV: time to live of live keys in ms, of ended ones in ms, then for each event: request id,
-- epoch, index of its first token, number of its tokens, event, end state ('' while it goes on).
-- Returns for each event 'ok', 'superseded', 'orphaned', or the state in which its job has ended.
local live, ended = ARGV[1], ARGV[2]
local orphaned = redis.call('EXISTS', KEYS[2]) == 0
local verdicts, fields = {}, {}
for i = 1, (#KEYS - 2) / 2 do
  local record, log = KEYS[2 * i + 1], KEYS[2 * i + 2]
  local a = 6 * i - 3
  local request, epoch, index, count, event, final =
    ARGV[a], ARGV[a + 1], tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]), ARGV[a + 4], ARGV[a + 5]
  local state, owner, emitted = unpack(redis.call('HMGET', record, 'state', 'epoch', 'tokens'))
  emitted = tonumber(emitted or 0)
  if owner ~= epoch or state == 'queued' then
    verdicts[i] = 'superseded'
  elseif state == final and emitted == index + count then
    verdicts[i] = 'ok'
  elseif state ~= 'running' then
    verdicts[i] = state
  elseif orphaned then
    verdicts[i] = 'orphaned'
  elseif emitted == index + count and final == '' then
    verdicts[i] = 'ok'
  elseif emitted ~= index then
    verdicts[i] = 'superseded'
  else
    redis.call('RPUSH', log, event)
    redis.call('PEXPIRE', log, final == '' and live or ended)
    redis.call('HSET', record, 'tokens', index + count)
    redis.call('PEXPIRE', record, final == '' and live or ended)
    if final ~= '' then redis.call('HSET', record, 'state', final) end
    fields[#fields + 1] = request
    fields[#fields + 1] = event
    verdicts[i] = 'ok'
  end
end
if #fields > 0 then
  redis.call('XADD', KEYS[1], '*', unpack(fields))
  redis.call('PEXPIRE', KEYS[1], live)
end
return verdicts
