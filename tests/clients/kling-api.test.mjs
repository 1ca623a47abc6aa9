// The npm package `kling-api`, unchanged: it signs with dummy keys, and what it shows its user is asserted.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { join } from "node:path";
import { describe, test } from "node:test";
import { promisify } from "node:util";

import { KlingAPIError } from "kling-api";

import { client, runFlows } from "./kling-api.flows.mjs";
import { assertPlayable, makeCertificate, startProxy } from "./support.mjs";

const POLLING = { interval: 100, timeout: 30_000, showSpinner: false };

/** All flows run at once, and images hold a slot each. */
const SLOTS = { KLING_PROXY_SANDBOX__CONCURRENCY: "13" };

/** What the user of the client sees of the error that `prompt` provokes. */
async function seenFor(baseURL, prompt) {
  const error = await client(baseURL)
    .textToVideo({ prompt })
    .then(() => assert.fail("it should have been refused"), (error) => error);
  assert.ok(error instanceof KlingAPIError, error);
  assert.equal(typeof error.requestId, "string");
  return { status: error.httpStatus, code: error.code, message: error.message, retryable: error.isRetryable() };
}

describe("kling-api", { concurrency: true, timeout: 60_000 }, () => {
  test("a text2video task is created, polled and downloaded", async (t) => {
    const { proxy } = await startProxy(t);
    const api = client(proxy);
    const created = await api.textToVideo({ prompt: "a cat" });
    assert.equal(created.code, 0);
    const result = await api.waitForVideoResult(created.data.task_id, undefined, POLLING);
    // Not by the client's own download, which refuses loopback addresses.
    const download = await fetch(result.data.task_result.videos[0].url);
    assert.deepEqual([download.status, download.headers.get("content-type")], [200, "video/mp4"]);
    await assertPlayable(t, new Uint8Array(await download.arrayBuffer()));
  });

  test("every family that it knows is used over http", async (t) => {
    const { proxy } = await startProxy(t, SLOTS);
    await runFlows(client(proxy));
  });

  test("every family that it knows is used over https, with nothing but its options changed", async (t) => {
    const { certificate, key } = await makeCertificate(t);
    const { proxy } = await startProxy(t, {
      ...SLOTS,
      KLING_PROXY_LISTEN__TLS__CERTIFICATE_FILE: certificate,
      KLING_PROXY_LISTEN__TLS__KEY_FILE: key,
    });
    assert.match(proxy, /^https:/);
    const flows = join(import.meta.dirname, "kling-api.flows.mjs");
    const run = (environment) => promisify(execFile)(process.execPath, [flows, proxy], { env: { ...process.env, ...environment } });
    await run({ NODE_EXTRA_CA_CERTS: certificate });
    await assert.rejects(run({}), /certificate/, "it is the certificate that makes it trusted");
  });

  test("a failed task is still a task, with its own message", async (t) => {
    const { proxy } = await startProxy(t);
    const api = client(proxy);
    const created = await api.textToVideo({ prompt: "sandbox:failed" });
    await assert.rejects(api.waitForVideoResult(created.data.task_id, undefined, POLLING), {
      name: "KlingAPIError",
      message: "Failure to pass the risk control system",
    });
  });

  test("errors reach the user with code, status and message", async (t) => {
    const { proxy } = await startProxy(t);
    const gateway = "upstream answered 502 Bad Gateway without a service code";
    const rows = [
      ["sandbox:1102", { status: 429, code: 1102, message: "Account balance not enough", retryable: false }],
      ["sandbox:1303", { status: 429, code: 1303, message: "parallel task over resource pack limit", retryable: false }],
      // This client resends a 502 by itself, creates included: three attempts.
      ["sandbox:html", { status: 502, code: 9103, message: gateway, retryable: true }],
    ];
    await Promise.all(
      rows.map(async ([prompt, expected]) => assert.deepEqual(await seenFor(proxy, prompt), expected, prompt)),
    );
  });

  test("with `errors.status = \"actionable\"` an empty account is no rate limit", async (t) => {
    const { proxy } = await startProxy(t, { KLING_PROXY_ERRORS__STATUS: "actionable" });
    const { status, code } = await seenFor(proxy, "sandbox:1102");
    assert.deepEqual({ status, code }, { status: 402, code: 1102 });
  });
});
