// The Vite app of docs/recipes.md: a real dev server, and a real browser with all its own checks of pages that call
// this machine.

import assert from "node:assert/strict";
import { readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { join } from "node:path";
import { test } from "node:test";

import { chromium } from "playwright-core";
import { createServer as createVite } from "vite";

import { root, startProxy, temporaryFolder } from "./support.mjs";

/** What docs/recipes.md says is in this file. */
async function fromRecipe(name) {
  const page = await readFile(join(root, "docs/recipes.md"), "utf8");
  const [, text] = page.split(`<!-- file: ${name} -->\n`)[1].match(/^```\w+\n(.*?)^```$/ms);
  return text;
}

/** The proxy has to know the origin of the app, and the app the address of the proxy: one of them goes first. */
async function freePort() {
  const server = createServer().listen(0, "localhost");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** What the app shows, on a port of its own, with the settings that `settings` makes of its origin. */
async function shownBy(t, settings) {
  const port = await freePort();
  const origin = `http://localhost:${port}`;
  const { proxy } = await startProxy(t, settings(origin));
  const app = await temporaryFolder(t);
  for (const name of ["index.html", "main.js", ".env.development"]) {
    const text = await fromRecipe(name);
    await writeFile(join(app, name), text.replace("http://127.0.0.1:5546", proxy));
  }
  const server = { port, strictPort: true };
  const vite = await createVite({ root: app, configFile: false, logLevel: "error", cacheDir: join(app, "cache"), server });
  t.after(() => vite.close());
  await vite.listen();

  const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu", "--no-proxy-server"] });
  t.after(() => browser.close());
  const tab = await browser.newPage();
  const failed = new Promise((resolve) => tab.on("pageerror", (error) => resolve(error.message)));
  await tab.goto(origin);
  const shown = tab.waitForFunction(() => document.body.textContent.trim()).then((text) => text.jsonValue());
  return Promise.race([shown, failed]);
}

test("a page of a listed origin makes a task", { timeout: 60_000 }, async (t) => {
  const settings = (origin) => ({ KLING_PROXY_ACCESS__ALLOWED_ORIGINS: JSON.stringify([origin]) });
  assert.match(await shownBy(t, settings), /^task [0-9]+$/);
});

test("a page of another origin does not", { timeout: 60_000 }, async (t) => {
  assert.equal(await shownBy(t, () => ({})), "Failed to fetch");
});
