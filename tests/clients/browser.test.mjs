// A real browser: what a web page can make of the proxy. The browser's own checks of pages that call this machine are
// off, so that ours alone are tested. Needs Chromium, as Debian installs it or where `CHROMIUM` says.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, describe, test } from "node:test";

import { chromium } from "playwright-core";

import { startProxy, startProxyTo } from "./support.mjs";

const PATH = "/v1/videos/text2video";
const TASK = { code: 0, message: "SUCCEED", request_id: "up-1", data: { task_id: "1", task_status: "submitted" } };

/** All that a rebound page is told. */
const REFUSAL = /^$|"type":"host_not_allowed"/;

/** How long a request may take to arrive, in milliseconds. Failing tests wait for it, others never do. */
const PATIENCE = 20_000;

/** Every name below `.test` is this machine, whatever the site: what DNS rebinding comes to in the end. */
const FLAGS = [
  "--host-resolver-rules=MAP *.test 127.0.0.1",
  "--disable-features=BlockInsecurePrivateNetworkRequests,LocalNetworkAccessChecks,LocalNetworkAccessChecksWebSockets",
  "--no-proxy-server",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

/** What a page does without asking anybody. Each runs in the page and resolves to what it could read. */
const ATTACKS = {
  "fetch": (url) => fetch(url).then((answer) => answer.text()),
  "fetch without CORS": (url) => fetch(url, { mode: "no-cors" }).then((answer) => answer.text()),
  "fetch with cookies": (url) => fetch(url, { credentials: "include" }).then((answer) => answer.text()),
  "POST of JSON": (url) => {
    const headers = { "content-type": "application/json" };
    return fetch(url, { method: "POST", headers, body: '{"prompt":"a cat"}' }).then((answer) => answer.text());
  },
  "POST of text": (url) => fetch(url, { method: "POST", body: '{"prompt":"a cat"}' }).then((answer) => answer.text()),
  "POST of text without CORS": (url) =>
    fetch(url, { method: "POST", mode: "no-cors", body: '{"prompt":"a cat"}' }).then((answer) => answer.text()),
  "DELETE": (url) => fetch(url, { method: "DELETE" }).then((answer) => answer.text()),
  "beacon": (url) => {
    navigator.sendBeacon(url, '{"prompt":"a cat"}');
    return "";
  },
  "form": (url) => {
    document.body.innerHTML = `
      <iframe name="answer"></iframe>
      <form action="${url}" method="post" enctype="text/plain" target="answer">
        <input name='{"prompt":"' value='a cat"}'>
      </form>`;
    const [frame, form] = document.body.children;
    form.submit();
    return new Promise((resolve) => {
      frame.onload = () => resolve(frame.contentDocument?.body.innerText ?? "");
    });
  },
  "frame": (url) => {
    document.body.innerHTML = `<iframe src="${url}"></iframe>`;
    const [frame] = document.body.children;
    return new Promise((resolve) => {
      frame.onload = () => resolve(frame.contentDocument?.body.innerText ?? "");
    });
  },
  "image": (url) => {
    document.body.innerHTML = `<img src="${url}">`;
    const [image] = document.body.children;
    return new Promise((resolve) => {
      image.onload = () => resolve("an image");
      image.onerror = () => resolve("");
    });
  },
  "script": (url) => {
    const script = document.createElement("script");
    script.src = url;
    document.body.append(script);
    return new Promise((resolve) => {
      script.onload = () => resolve("a script");
      script.onerror = () => resolve("");
    });
  },
  "style sheet": (url) => {
    document.body.innerHTML = `<link rel="stylesheet" href="${url}">`;
    const [sheet] = document.body.children;
    return new Promise((resolve) => {
      sheet.onload = () => resolve("a style sheet");
      sheet.onerror = () => resolve("");
    });
  },
  "EventSource": (url) => {
    const events = new EventSource(url);
    return new Promise((resolve) => {
      events.onopen = () => resolve("a stream of events");
      events.onerror = () => resolve("");
    });
  },
  "WebSocket": (url) => {
    const socket = new WebSocket(url.replace("http", "ws"));
    return new Promise((resolve) => {
      socket.onopen = () => resolve("a socket");
      socket.onerror = () => resolve("");
    });
  },
};

let browser;
before(async () => {
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });
});
after(() => browser.close());

/** A server on a free port, until the test `t` ends; resolves to the port. */
async function listen(t, answer) {
  const server = createServer(answer);
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.after(() => {
    server.close();
    server.closeAllConnections();
  });
  return server.address().port;
}

/** An upstream that answers everything alike and writes down what it was asked. */
async function startUpstream(t, status = 200, body = TASK) {
  const requests = [];
  const port = await listen(t, (request, response) => {
    requests.push(`${request.method} ${request.url}`);
    response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
  });
  return { url: `http://127.0.0.1:${port}`, requests };
}

/** The port of a web server whose pages are empty. */
function startSite(t) {
  return listen(t, (_, response) => response.writeHead(200, { "content-type": "text/html" }).end("<body></body>"));
}

/** An empty tab, until the test `t` ends. */
async function openTab(t) {
  const context = await browser.newContext();
  t.after(() => context.close());
  return context.newPage();
}

/** A tab with a page of this origin. */
async function open(t, origin) {
  const tab = await openTab(t);
  await tab.goto(origin);
  return tab;
}

/**
 * A page whose host name led to its own server when it was loaded, and leads to ours by now: to the browser, what is
 * at `url` is of the page's own origin.
 */
async function openRebound(t, url) {
  const tab = await openTab(t);
  await tab.route("**", (route) => route.fulfill({ contentType: "text/html", body: "<body></body>" }));
  await tab.goto(url);
  await tab.unrouteAll();
  return tab;
}

/** A page of an allowed origin, and the proxy that allows it. */
async function openAllowed(t, upstream) {
  const origin = `http://localhost:${await startSite(t)}`;
  const { proxy } = await startProxyTo(t, upstream.url, {
    KLING_PROXY_ACCESS__ALLOWED_ORIGINS: JSON.stringify([origin]),
  });
  return { proxy, tab: await open(t, origin) };
}

/** The same listener by another host name. */
function renamed(url, hostname) {
  return Object.assign(new URL(url), { hostname }).origin;
}

/** How often the guard has refused for this reason. */
async function refusals(admin, reason) {
  const metrics = await (await fetch(`${admin}/metrics`)).text();
  return Number(new RegExp(`^kling_proxy_guard_refusals_total{.*"${reason}".*} (.*)`, "m").exec(metrics)?.[1] ?? 0);
}

/** Each attack of the page is refused for this reason; it reaches nothing, and reads nothing but `readable`. */
async function assertPowerless(tab, url, { admin, upstream, reason, readable = /^$/ }) {
  for (const [name, attack] of Object.entries(ATTACKS)) {
    const refusedBefore = await refusals(admin, reason);
    assert.match(await attempt(tab, attack, url), readable, `${name} read`);
    // The answer to a beacon is nobody's: it may still be under way.
    const deadline = Date.now() + PATIENCE;
    while (upstream.requests.length === 0 && (await refusals(admin, reason)) === refusedBefore) {
      assert.ok(Date.now() < deadline, `${name} did not arrive at the proxy`);
    }
    assert.deepEqual(upstream.requests, [], name);
  }
}

/** What an attack reads; nothing if it fails. */
function attempt(tab, attack, url) {
  return tab.evaluate(attack, url).catch(() => "");
}

describe("browser", { timeout: 120_000 }, () => {
  for (const [relation, host] of [["of another site", "evil.test"], ["of another port of this machine", "127.0.0.1"]]) {
    test(`a page ${relation} reaches and reads nothing`, async (t) => {
      const upstream = await startUpstream(t);
      const { proxy, admin } = await startProxyTo(t, upstream.url);
      const tab = await open(t, `http://${host}:${await startSite(t)}`);
      await assertPowerless(tab, proxy + PATH, { admin, upstream, reason: "origin_not_allowed" });
    });
  }

  test("a rebound page reaches nothing, and reads only why", async (t) => {
    const upstream = await startUpstream(t);
    const { proxy, admin } = await startProxyTo(t, upstream.url);
    const rebound = renamed(proxy, "rebound.test");
    const tab = await openRebound(t, rebound);
    await assertPowerless(tab, rebound + PATH, { admin, upstream, reason: "host_not_allowed", readable: REFUSAL });
    assert.equal((await tab.goto(rebound + PATH)).status(), 421);
  });

  test("a page of an allowed origin calls like any other client", async (t) => {
    const upstream = await startUpstream(t);
    const { proxy, tab } = await openAllowed(t, upstream);
    const seen = await tab.evaluate(async (url) => {
      const headers = { "content-type": "application/json", authorization: "Bearer any" };
      const body = JSON.stringify({ prompt: "a cat" });
      const answer = await fetch(url, { method: "POST", headers, body });
      return [answer.status, await answer.json(), answer.headers.has("kling-proxy-request-id")];
    }, proxy + PATH);
    assert.deepEqual(seen, [200, TASK, true]);
    assert.deepEqual(upstream.requests, [`POST ${PATH}`], "the preflight is answered by the proxy");
  });

  test("a page of an allowed origin reads errors and their headers", async (t) => {
    const upstream = await startUpstream(t, 429, { code: 1303, message: "too many", request_id: "up-1" });
    const { proxy, tab } = await openAllowed(t, upstream);
    const ask = async (url) => {
      const answer = await fetch(url);
      const headers = ["kling-proxy-error", "retry-after", "x-should-retry"].map((name) => answer.headers.get(name));
      return [answer.status, (await answer.json()).code, ...headers];
    };
    const upstreams = await tab.evaluate(ask, `${proxy}${PATH}/1`);
    assert.deepEqual(upstreams, [429, 1303, "concurrency_limited", upstreams[3], "true"]);
    assert.match(upstreams[3], /^\d+$/);
    assert.deepEqual(await tab.evaluate(ask, `${proxy}/_proxy/x`), [404, 9007, "not_found", null, "false"]);
  });

  test("a page of an allowed origin makes, polls, shows and downloads a video of the sandbox", async (t) => {
    const origin = `http://localhost:${await startSite(t)}`;
    const { proxy } = await startProxy(t, { KLING_PROXY_ACCESS__ALLOWED_ORIGINS: JSON.stringify([origin]) });
    const tab = await open(t, origin);
    const seen = await tab.evaluate(async (url) => {
      const headers = { "content-type": "application/json" };
      const ask = async (...request) => (await (await fetch(...request)).json()).data;
      let task = await ask(url, { method: "POST", headers, body: JSON.stringify({ prompt: "a cat" }) });
      while (task.task_status !== "succeed") task = await ask(`${url}/${task.task_id}`);
      const [{ url: file }] = task.task_result.videos;
      const download = await fetch(file);
      const video = document.createElement("video");
      const shown = new Promise((resolve) => {
        video.onloadedmetadata = () => resolve(`${video.duration} s`);
        video.onerror = () => resolve(video.error.message);
      });
      video.src = file;
      return [new URL(file).origin, download.status, (await download.blob()).type, await shown];
    }, proxy + PATH);
    assert.deepEqual(seen, [proxy, 200, "video/mp4", "2 s"]);
  });

  test("a foreign page reads nothing of the admin listener", async (t) => {
    const { admin } = await startProxyTo(t, (await startUpstream(t)).url);
    const tab = await open(t, `http://evil.test:${await startSite(t)}`);
    for (const path of ["/", "/metrics", "/health/live", "/health/ready"]) {
      assert.equal((await fetch(admin + path)).status, 200, path);
      for (const name of ["fetch", "fetch without CORS", "frame", "EventSource", "WebSocket"]) {
        assert.equal(await attempt(tab, ATTACKS[name], admin + path), "", `${name} of ${path}`);
      }
    }
  });

  test("no page ends the proxy, even where that can be asked for", async (t) => {
    const upstream = await startUpstream(t);
    const { admin } = await startProxyTo(t, upstream.url, { KLING_PROXY_ADMIN__QUIT: "true" });
    const foreign = await open(t, `http://evil.test:${await startSite(t)}`);
    await assertPowerless(foreign, `${admin}/quit`, { admin, upstream, reason: "origin_not_allowed" });
    const there = renamed(admin, "rebound.test");
    const rebound = await openRebound(t, there);
    await assertPowerless(rebound, `${there}/quit`, { admin, upstream, reason: "host_not_allowed", readable: REFUSAL });
    assert.equal((await fetch(`${admin}/health/ready`)).status, 200);
  });
});
