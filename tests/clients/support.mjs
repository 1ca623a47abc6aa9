// Starts the proxy in front of its own sandbox or another upstream, on free ports, and looks at the files it hands out.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";

export const root = resolve(import.meta.dirname, "../..");
const target = resolve(root, process.env.CARGO_TARGET_DIR ?? "target");
const binary = process.env.KLING_PROXY_BIN ?? join(target, "debug/kling-proxy");

/** A folder that is gone when the test `t` ends. */
export async function temporaryFolder(t) {
  const folder = await mkdtemp(join(tmpdir(), "kling-proxy-"));
  t.after(() => rm(folder, { recursive: true }));
  return folder;
}

/** A certificate for this machine and its key, as the README makes them, until the test `t` ends. */
export async function makeCertificate(t) {
  const folder = await temporaryFolder(t);
  const [certificate, key] = ["certificate.pem", "key.pem"].map((name) => join(folder, name));
  const names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1";
  await promisify(execFile)("openssl", [
    ...["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "365"],
    ...["-subj", "/CN=localhost", "-addext", "basicConstraints=critical,CA:FALSE", "-addext", names],
    ...["-keyout", key, "-out", certificate],
  ]);
  return { certificate, key };
}

/**
 * `kling-proxy serve --sandbox`, until the test `t` ends; resolves to the URL of each listener by its name: `proxy`,
 * `admin`, `sandbox`. It sees no variable of the caller but `PATH`, and no settings file.
 */
export function startProxy(t, settings = {}) {
  return start(t, ["--sandbox"], ["proxy", "admin", "sandbox"], { KLING_PROXY_SANDBOX__TASK_TIME: "300ms", ...settings });
}

/** The same in front of an upstream of the test's own. */
export function startProxyTo(t, upstream, settings = {}) {
  const keys = { KLING_ACCESS_KEY: "an-access-key", KLING_SECRET_KEY: "a-secret-key" };
  return start(t, ["--upstream", upstream], ["proxy", "admin"], { ...keys, ...settings });
}

async function start(t, flags, listeners, variables) {
  const home = await temporaryFolder(t);
  const child = spawn(binary, ["serve", ...flags], {
    env: {
      PATH: process.env.PATH,
      HOME: home,
      KLING_PROXY_LISTEN__ADDRESS: "127.0.0.1:0",
      KLING_PROXY_ADMIN__ADDRESS: "127.0.0.1:0",
      KLING_PROXY_UPSTREAM__WARM_UP: "false", // a test counts what upstream sees
      ...variables,
    },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let log = "";
  child.stderr.setEncoding("utf8").on("data", (text) => (log += text));
  const exit = once(child, "exit");
  t.after(async () => {
    child.kill("SIGTERM");
    assert.deepEqual(await exit, [0, null], `it did not end cleanly:\n${log}`);
  });

  const urls = {};
  for await (const line of createInterface({ input: child.stdout })) {
    log += `${line}\n`;
    const [name, url] = line.split(/ +/);
    if (listeners.includes(name)) urls[name] = url;
    if (listeners.every((name) => urls[name])) break;
  }
  if (!urls.proxy) throw new Error(`it did not start:\n${log}`);
  child.stdout.resume(); // a full pipe would stop the child
  return urls;
}

/** Fails unless `bytes` are an MP4 file, playable as far as `ffprobe` can tell where it is installed. */
export async function assertPlayable(t, bytes) {
  assert.equal(Buffer.from(bytes.subarray(4, 8)).toString("latin1"), "ftyp");
  const file = join(await temporaryFolder(t), "result.mp4");
  await writeFile(file, bytes);
  const probe = ["-v", "error", "-select_streams", "v", "-show_entries", "stream=codec_type", "-of", "csv=p=0", file];
  try {
    const { stdout, stderr } = await promisify(execFile)("ffprobe", probe);
    assert.deepEqual([stdout.trim(), stderr], ["video", ""]);
  } catch (error) {
    if (error.code !== "ENOENT") throw error;
    t.diagnostic("ffprobe is not installed: looked at the first box only");
  }
}
