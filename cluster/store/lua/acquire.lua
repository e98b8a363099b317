-- A lease with the next epoch; 0 while another holder's runs; -1 - E where the writer's fence is out, E being the newest epoch.
-- KEYS: lease hash, lease hash of the writer's fence. ARGV: holder, milliseconds, "1" to steal, fence epoch or "".
if ARGV[4] ~= "" then
  local current = redis.call("HGET", KEYS[2], "epoch") or "0"
  if current ~= ARGV[4] then return -1 - current end
end
local held = redis.call("HMGET", KEYS[1], "holder", "until")
local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[3] ~= "1" and held[1] and held[1] ~= ARGV[1] and tonumber(held[2]) > now then return 0 end
redis.call("HSET", KEYS[1], "holder", ARGV[1], "until", string.format("%.0f", now + ARGV[2]))
return redis.call("HINCRBY", KEYS[1], "epoch", 1)
