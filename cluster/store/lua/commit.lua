-- All or nothing: check the fence, the idempotency key and the expected versions; then write records, log events, append entries.
-- KEYS: version counter, index, log, lease hash, submission hash, then W record hashes, then A streams.
-- ARGV: fence epoch or "", submission digest or "", its seconds, W, E, A, what names of lists begin with, then W times (name,
--       expected or "", text or "" to delete, the record's place and its lists, a line each, or ""), E event texts, A times
--       (maxlen or "", entry text).
-- Answer: {"ok", version, event ids...} | {"fenced", current} | {"conflict", name, found} | {"repeated", name} | {"mismatch"}.
local epoch, digest, keep_s = ARGV[1], ARGV[2], tonumber(ARGV[3])
local writes, events, appends, lists = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]

local function relist(command, listed)
  local place
  for line in string.gmatch(listed, "[^\n]+") do
    if not place then
      place = line
    elseif command == "ZADD" then
      redis.call("ZADD", lists .. line, 0, place)
    else
      redis.call("ZREM", lists .. line, place)
    end
  end
end

if epoch ~= "" then
  local current = redis.call("HGET", KEYS[4], "epoch") or "0"
  if current ~= epoch then return {"fenced", tonumber(current)} end
end
if digest ~= "" then
  local used = redis.call("HMGET", KEYS[5], "digest", "name")
  if used[1] then
    if used[1] == digest then return {"repeated", used[2]} end
    return {"mismatch"}
  end
end
for i = 1, writes do
  local expected = ARGV[7 + 4 * i - 2]
  if expected ~= "" then
    local found = redis.call("HGET", KEYS[5 + i], "version") or "0"
    if found ~= expected then return {"conflict", ARGV[7 + 4 * i - 3], tonumber(found)} end
  end
end

local version = redis.call("INCR", KEYS[1])
for i = 1, writes do
  local name, text, listed, key = ARGV[7 + 4 * i - 3], ARGV[7 + 4 * i - 1], ARGV[7 + 4 * i], KEYS[5 + i]
  local before = redis.call("HGET", key, "listed") or ""
  if before ~= listed then
    relist("ZREM", before)
    relist("ZADD", listed)
  end
  if text == "" then
    redis.call("DEL", key)
    redis.call("ZREM", KEYS[2], name)
  else
    redis.call("HSET", key, "version", version, "text", text, "listed", listed)
    redis.call("ZADD", KEYS[2], 0, name)
  end
end
local answer = {"ok", version}
local at = 7 + 4 * writes
for i = 1, events do
  answer[#answer + 1] = redis.call("XADD", KEYS[3], "*", "e", ARGV[at + i])
end
at = at + events
for i = 1, appends do
  local maxlen, text, key = ARGV[at + 2 * i - 1], ARGV[at + 2 * i], KEYS[5 + writes + i]
  if maxlen == "" then
    redis.call("XADD", key, "*", "e", text)
  else
    redis.call("XADD", key, "MAXLEN", "~", maxlen, "*", "e", text)
  end
end
if digest ~= "" then
  redis.call("HSET", KEYS[5], "digest", digest, "name", ARGV[8])
  redis.call("EXPIRE", KEYS[5], keep_s)
end
return answer
