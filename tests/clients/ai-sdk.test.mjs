// The AI SDK: a video model as its providers are written, used through `experimental_generateVideo`.

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import {
  createJsonErrorResponseHandler,
  createJsonResponseHandler,
  delay,
  getFromApi,
  postJsonToApi,
} from "@ai-sdk/provider-utils";
import { APICallError, RetryError, experimental_generateVideo as generateVideo } from "ai";
import { z } from "zod";

import { assertPlayable, startProxy } from "./support.mjs";

const errorSchema = z.object({
  code: z.number(),
  message: z.string(),
  request_id: z.string(),
  error: z.object({
    type: z.string(),
    source: z.enum(["upstream", "proxy"]),
    upstream_status: z.number().nullable(),
    definition: z.string(),
    explanation: z.string(),
    solution: z.string(),
    retryable: z.boolean(),
    attempts: z.number().int(),
    hint: z.string().optional(),
    excerpt: z.string().optional(),
  }),
});

const taskSchema = z.object({
  code: z.literal(0),
  data: z.object({
    task_id: z.string(),
    task_status: z.enum(["submitted", "processing", "succeed", "failed"]),
    task_status_msg: z.string().nullish(),
    task_result: z.object({ videos: z.array(z.object({ url: z.url() })) }).nullish(),
  }),
});

/** As the SDK judges by itself: every 408, 409, 429 and 5xx may be sent again. */
const byStatus = undefined;
/** As a provider judges that reads what the proxy says. */
const byHeader = (response) => response.headers.get("x-should-retry") === "true";

class VideoModel {
  specificationVersion = "v4";
  provider = "kling";
  modelId = "kling-v2-6";
  maxVideosPerCall = 1;
  creates = 0;

  constructor(baseURL, isRetryable) {
    this.url = `${baseURL}/v1/videos/text2video`;
    this.handlers = {
      successfulResponseHandler: createJsonResponseHandler(taskSchema),
      failedResponseHandler: createJsonErrorResponseHandler({
        errorSchema,
        errorToMessage: ({ message }) => message,
        isRetryable,
      }),
    };
  }

  async doGenerate({ prompt, abortSignal, headers }) {
    this.creates += 1;
    const common = { headers, abortSignal, ...this.handlers };
    let { value, responseHeaders } = await postJsonToApi({
      ...common,
      url: this.url,
      body: { model_name: this.modelId, prompt },
    });
    while (!["succeed", "failed"].includes(value.data.task_status)) {
      await delay(100, { abortSignal });
      ({ value, responseHeaders } = await getFromApi({
        ...common,
        url: `${this.url}/${value.data.task_id}`,
        validateUrl: false,
      }));
    }
    return {
      videos: value.data.task_result.videos.map(({ url }) => ({ type: "url", url, mediaType: "video/mp4" })),
      warnings: [],
      response: { timestamp: new Date(), modelId: this.modelId, headers: responseHeaders },
    };
  }
}

// The SDK's own download refuses loopback addresses.
async function download({ url }) {
  const response = await fetch(url);
  return { data: new Uint8Array(await response.arrayBuffer()), mediaType: response.headers.get("content-type") };
}

/** The error of a create with `prompt`, and how often the SDK sent it. */
async function refused({ proxy, prompt, isRetryable, maxRetries = 1 }) {
  const model = new VideoModel(proxy, isRetryable);
  const error = await generateVideo({ model, prompt, maxRetries, download })
    .then(() => assert.fail("it should have been refused"), (error) => error);
  return { error, creates: model.creates };
}

/** What the user sees of one failed call. */
function seen(error) {
  assert.ok(APICallError.isInstance(error), error);
  const { code, error: detail } = errorSchema.parse(error.data);
  return {
    status: error.statusCode,
    message: error.message,
    retryable: error.isRetryable,
    type: error.responseHeaders["kling-proxy-error"],
    shouldRetry: error.responseHeaders["x-should-retry"],
    code,
    detail: [detail.type, detail.source, detail.retryable],
  };
}

describe("AI SDK", { concurrency: true, timeout: 60_000 }, () => {
  test("a video is generated", async (t) => {
    const { proxy } = await startProxy(t);
    const { video, responses } = await generateVideo({ model: new VideoModel(proxy), prompt: "a cat", download });
    assert.equal(video.mediaType, "video/mp4");
    assert.match(responses[0].headers["kling-proxy-request-id"], /^[A-Za-z0-9._-]{1,64}$/);
    await assertPlayable(t, video.uint8Array);
  });

  test("its own download refuses the sandbox's address", async (t) => {
    const { proxy } = await startProxy(t);
    const model = new VideoModel(proxy);
    await assert.rejects(generateVideo({ model, prompt: "a cat", maxRetries: 0 }), (error) => {
      assert.match(error.message, new RegExp(`${new URL(proxy).hostname} is not allowed`));
      return true;
    });
  });

  test("1102: hopeless, yet sent again by a client that goes by a 429", async (t) => {
    const { proxy } = await startProxy(t);
    const expected = {
      status: 429,
      message: "Account balance not enough",
      type: "resource_pack_depleted",
      shouldRetry: "false",
      code: 1102,
      detail: ["resource_pack_depleted", "upstream", false],
    };
    const [status, header] = await Promise.all([
      refused({ proxy, prompt: "sandbox:1102", isRetryable: byStatus }),
      refused({ proxy, prompt: "sandbox:1102", isRetryable: byHeader }),
    ]);

    assert.ok(RetryError.isInstance(status.error), status.error);
    assert.deepEqual([status.error.reason, status.creates], ["maxRetriesExceeded", 2]);
    assert.deepEqual(seen(status.error.lastError), { ...expected, retryable: true });

    assert.deepEqual(seen(header.error), { ...expected, retryable: false });
    assert.equal(header.creates, 1);
    assert.equal(header.error.responseHeaders["retry-after"], undefined);
  });

  test("1102 with `errors.status = \"actionable\"`: no client sends it again", async (t) => {
    const { proxy } = await startProxy(t, { KLING_PROXY_ERRORS__STATUS: "actionable" });
    const { error, creates } = await refused({ proxy, prompt: "sandbox:1102", isRetryable: byStatus });
    const { status, retryable, code } = seen(error);
    assert.deepEqual({ status, retryable, code, creates }, { status: 402, retryable: false, code: 1102, creates: 1 });
  });

  test("1303: worth another try, after the time that the answer names", async (t) => {
    const { proxy } = await startProxy(t);
    const { error, creates } = await refused({ proxy, prompt: "sandbox:1303", isRetryable: byHeader });
    assert.ok(RetryError.isInstance(error), error);
    assert.deepEqual([error.reason, error.errors.length, creates], ["maxRetriesExceeded", 2, 2]);
    assert.match(error.lastError.responseHeaders["retry-after"], /^[1-9][0-9]*$/);
    assert.deepEqual(seen(error.lastError), {
      status: 429,
      message: "parallel task over resource pack limit",
      retryable: true,
      type: "concurrency_limited",
      shouldRetry: "true",
      code: 1303,
      detail: ["concurrency_limited", "upstream", true],
    });
  });

  test("a broken gateway's page: typed, and a create is not sent again", async (t) => {
    const { proxy } = await startProxy(t);
    const { error, creates } = await refused({ proxy, prompt: "sandbox:html", isRetryable: byHeader });
    assert.equal(creates, 1);
    assert.match(error.data.error.excerpt, /<html>/i);
    assert.match(error.data.error.hint, /\S/);
    assert.deepEqual(seen(error), {
      status: 502,
      message: "upstream answered 502 Bad Gateway without a service code",
      retryable: false,
      type: "upstream_bad_response",
      shouldRetry: "false",
      code: 9103,
      detail: ["upstream_bad_response", "proxy", false],
    });
  });
});
