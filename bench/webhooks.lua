-- wrk: send the signed webhooks of a file, whose lines are "timestamp signature body".
local path, next_line

function init(args)
  path = args[1]
  next_line = io.lines(path)
end

function request()
  local line = next_line()
  if not line then -- the end of the file: start over, which sends the same events again
    next_line = io.lines(path)
    line = next_line()
  end
  local stamp, signature, body = line:match("^(%S+) (%S+) (.*)$")
  return wrk.format("POST", "/webhook", {
    ["Content-Type"] = "application/json",
    ["X-CIO-Timestamp"] = stamp,
    ["X-CIO-Signature"] = signature,
  }, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.requests, summary.duration, errors.status,
    errors.timeout + errors.read + errors.connect, latency:percentile(50), latency:percentile(99)))
end
