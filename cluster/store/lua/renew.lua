-- Let the lease run for that long from now on (0: release it); 0 if its epoch is no longer the newest.
-- KEYS: lease hash. ARGV: epoch, milliseconds.
if redis.call("HGET", KEYS[1], "epoch") ~= ARGV[1] then return 0 end
local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call("HSET", KEYS[1], "until", string.format("%.0f", now + ARGV[2]))
return 1
