// What a user of the npm package `kling-api` does with it, one flow for each family that it knows.
//
// Also a program, since Node.js reads NODE_EXTRA_CA_CERTS at its start only: `node kling-api.flows.mjs BASE_URL` runs
// all of them against a proxy that speaks https, which is the only way the client takes a base URL in its options.

import assert from "node:assert/strict";

import { KlingAPI } from "kling-api";

const KEYS = { accessKey: "no-access-key", secretKey: "no-secret-key" };
const POLLING = { interval: 100, timeout: 30_000, showSpinner: false };
const IMAGE = "https://files.test/cat.png";

/** The client: unchanged over https, with another base URL behind its back over http. */
export function client(baseUrl) {
  if (baseUrl.startsWith("https:")) return new KlingAPI({ ...KEYS, baseUrl });
  const api = new KlingAPI(KEYS);
  api.httpClient.client.defaults.baseURL = baseUrl;
  return api;
}

/** Method, its query, its parameters, and how many results come of them. */
const VIDEOS = [
  ["textToVideo", "queryTextToVideoTask", { prompt: "a cat" }],
  ["imageToVideo", "queryImageToVideoTask", { image: IMAGE, prompt: "a cat" }],
  ["multiImageToVideo", "queryMultiImageToVideoTask", { image_list: [{ image: IMAGE }], prompt: "a cat" }],
  ["omniVideo", "queryOmniVideoTask", { prompt: "a cat", image_list: [{ image_url: IMAGE, type: "first_frame" }] }],
  ["extendVideo", "queryExtendVideoTask", { video_id: "123456789012345678", prompt: "more" }],
  ["createAvatar", "queryAvatarTask", { image: IMAGE, audio_id: "1", external_task_id: "my avatar" }],
];
const IMAGES = [
  ["generateImage", "queryImageGenTask", { prompt: "a cat", n: 3 }, 3],
  ["omniImage", "queryOmniImageTask", { prompt: "a cat", image_list: [{ image: IMAGE }], n: 2 }, 2],
  ["multiImageToImage", "queryMultiImageToImageTask", { subject_image_list: [{ subject_image: IMAGE }] }, 1],
  [
    "expandImage",
    "queryImageExpandTask",
    { image: IMAGE, up_expansion_ratio: 0.1, down_expansion_ratio: 0, left_expansion_ratio: 0, right_expansion_ratio: 0 },
    1,
  ],
];

async function make(api, method, query, parameters, wait, sort) {
  const created = await api[method](parameters);
  assert.equal(created.code, 0, method);
  const made = await api[wait](created.data.task_id, api[query].bind(api), POLLING);
  assert.equal(made.data.task_id, created.data.task_id, method);
  const results = made.data.task_result[sort];
  // Not by the client's own download, which refuses loopback addresses.
  for (const { url } of results) assert.equal((await fetch(url)).status, 200, `${method}: ${url}`);
  return results.length;
}

/** Runs all of them at once. */
export async function runFlows(api) {
  const videos = VIDEOS.map(async ([method, query, parameters]) => {
    assert.equal(await make(api, method, query, parameters, "waitForVideoResult", "videos"), 1, method);
  });
  const images = IMAGES.map(async ([method, query, parameters, count]) => {
    assert.equal(await make(api, method, query, parameters, "waitForImageResult", "images"), count, method);
  });
  await Promise.all([...videos, ...images]);
  assert.equal(await api.healthCheck(), true);
  const now = Date.now();
  const account = await api.getAccountInfo(now - 1000, now);
  const packs = account.data.resource_pack_subscribe_infos;
  const used = packs.map((pack) => pack.total_quantity - pack.remaining_quantity);
  assert.equal(used.reduce((sum, units) => sum + units), 13, "a unit for each result");
}

if (import.meta.filename === process.argv[1]) await runFlows(client(process.argv[2]));
