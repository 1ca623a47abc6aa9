// The npm package `kling-api`, unchanged: it signs with dummy keys, and what it shows its user is asserted.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { KlingAPI, KlingAPIError } from "kling-api";

import { assertPlayable, startProxy } from "./support.mjs";

const POLLING = { interval: 100, timeout: 30_000, showSpinner: false };

function client(baseURL) {
  const api = new KlingAPI({ accessKey: "no-access-key", secretKey: "no-secret-key" });
  api.httpClient.client.defaults.baseURL = baseURL; // `baseUrl` takes https only
  return api;
}

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
