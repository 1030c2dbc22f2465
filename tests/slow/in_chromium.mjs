// Runs one module in a page of headless Chromium, offline, and prints its result as one line of JSON.
//
//     node in_chromium.mjs CHROMIUM NODE_MODULES MODELS PAGE
//
// CHROMIUM is the browser's program, MODELS a folder of bundles (served as /models/), PAGE the module: its default
// export is the result, or a promise of it. Other modules (.mjs) in PAGE's folder are served beside it. In the page,
// "@huggingface/transformers" is the build for browsers in NODE_MODULES, which finds its WebAssembly there too. A missing
// graph or file of weights ends the run: the library would wait for it forever. Printed: {result, served: {path: bytes}}.
import { createReadStream, statSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, extname, join, normalize } from "node:path";
import { pathToFileURL } from "node:url";

const [, , program, modules, models, page] = process.argv;
const { chromium } = await import(pathToFileURL(join(modules, "playwright-core", "index.mjs")).href);

const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
const TRANSFORMERS = "/node_modules/@huggingface/transformers/dist/transformers.min.js";
const HTML = `<!doctype html><meta charset="utf-8"><title>bundle</title>
<script type="importmap">{"imports": {"@huggingface/transformers": "${TRANSFORMERS}"}}</script>
<script type="module">
  import { env } from "@huggingface/transformers";
  env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/"; // the default is a public server
  env.backends.onnx.wasm.numThreads = 1;
  env.useBrowserCache = false;
  globalThis.page = { result: import("/page.mjs").then((module) => module.default) };
</script>`;

function fileOf(path) {
  if (path === "/page.mjs") return page;
  if (/^\/\w+\.mjs$/.test(path)) return join(dirname(page), path.slice(1));
  for (const [prefix, folder] of [["/node_modules/", modules], ["/models/", models]]) {
    const inside = normalize(path.slice(prefix.length));
    if (path.startsWith(prefix) && !inside.startsWith("..")) return join(folder, inside);
  }
  return null;
}

const served = {};
let missing = () => {};
const server = createServer((request, response) => {
  const path = decodeURIComponent(new URL(request.url, "http://local").pathname);
  if (path === "/") return response.setHeader("Content-Type", "text/html").end(HTML);
  const file = fileOf(path);
  const size = file && statSync(file, { throwIfNoEntry: false })?.size;
  if (size === undefined || size === null) {
    response.writeHead(404).end();
    if (path.includes("/onnx/")) missing(path);
    return;
  }
  served[path] = size;
  response.writeHead(200, { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream", "Content-Length": size });
  if (request.method === "HEAD") return response.end();
  createReadStream(file).pipe(response);
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));

const browser = await chromium.launch({ executablePath: program, args: ["--no-sandbox"] });
try {
  const tab = await browser.newPage();
  tab.on("console", (message) => console.error(message.text()));
  tab.on("pageerror", (error) => console.error(String(error)));
  const failed = new Promise((_, reject) => {
    missing = (path) => reject(new Error(`no such file: ${path}`));
    tab.on("crash", () => reject(new Error("the page crashed: out of memory?")));
  });
  await tab.goto(`http://127.0.0.1:${server.address().port}/`);
  await tab.waitForFunction(() => globalThis.page !== undefined);
  const result = await Promise.race([tab.evaluate(() => globalThis.page.result), failed]);
  console.log(JSON.stringify({ result, served }));
} finally {
  await browser.close();
  server.close();
}
