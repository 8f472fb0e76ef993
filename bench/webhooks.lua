-- wrk: the next signed webhook of the file BENCH_EVENTS, whose lines are "timestamp signature body".
local next_line

function init(args)
  next_line = io.lines(args[1])
end

function request()
  local line = next_line()
  if not line then
    wrk.thread:stop()
    return wrk.format("GET", "/health")
  end
  local stamp, signature, body = line:match("^(%S+) (%S+) (.*)$")
  return wrk.format("POST", "/webhook", {
    ["Content-Type"] = "application/json",
    ["X-CIO-Timestamp"] = stamp,
    ["X-CIO-Signature"] = signature,
  }, body)
end

function done(summary, latency, requests)
  io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.requests, summary.duration, summary.errors.status,
    summary.errors.timeout + summary.errors.read + summary.errors.connect, latency:percentile(50), latency:percentile(99)))
end
