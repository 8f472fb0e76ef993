// Node-RED without an editor and log, on the port and with the folder that bench.py gives it.
module.exports = {
  uiHost: "127.0.0.1",
  uiPort: process.env.PORT,
  userDir: process.env.NODE_RED_FOLDER,
  httpAdminRoot: false,
  telemetry: { enabled: false },
  logging: { console: { level: "error" } },
};
