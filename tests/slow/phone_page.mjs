// Drives the phone page in a real Chromium for tests/slow/test_phone_page.py.
//
//   node phone_page.mjs '{"playwright": folder, "chromium": program, "url": address, "scenario": name, ...}'
//
// prints one line of JSON: what the page showed and did. Touches, 360 x 640, as on a small phone.

const given = JSON.parse(process.argv[2]);
const { chromium } = (await import(`${given.playwright}/index.mjs`)).default ?? (await import(`${given.playwright}/index.mjs`));

const browser = await chromium.launch({ executablePath: given.chromium, headless: true, args: ["--disable-gpu"] });
const context = await browser.newContext({
  viewport: { width: given.width ?? 360, height: 640 },
  deviceScaleFactor: 2,
  hasTouch: true,
  isMobile: true,
  colorScheme: given.dark ? "dark" : "light",
  ignoreHTTPSErrors: true,
});
const page = await context.newPage();
page.setDefaultTimeout(300_000);

const complaints = [];
let fetched = [];
page.on("console", (message) => {
  if (["error", "warning"].includes(message.type())) complaints.push(message.text());
});
page.on("pageerror", (error) => complaints.push(String(error)));
context.on("request", (request) => {
  if (!request.url().startsWith(given.url.slice(0, given.url.indexOf("/", 8)))) complaints.push(`asked ${request.url()}`);
  if (request.url().includes("/bundle/")) fetched.push(request.url().split("/bundle/")[1]);
});

const data = (name) => page.evaluate((key) => document.documentElement.dataset[key] ?? null, name);
const picture = (name) => given.pictures && page.screenshot({ path: `${given.pictures}/${name}.png` });
const whole = (name) => given.pictures && page.screenshot({ path: `${given.pictures}/${name}.png`, fullPage: true });
/** How far the page is wider than the screen. */
const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
/** Buttons and fields that are lower than a fingertip. */
const small = () =>
  page.evaluate(() =>
    [...document.querySelectorAll("button, select, textarea, summary")]
      .filter((one) => one.offsetParent && one.getBoundingClientRect().height < 44)
      .map((one) => one.id || one.tagName),
  );

async function open() {
  await page.goto(given.url);
  await page.waitForFunction(() => {
    const fault = document.getElementById("fault"); // shows a text of its own until the scripts run
    return document.documentElement.dataset.ready || !(fault.hidden || fault.textContent.includes("If this text stays"));
  });
}

async function ask(text) {
  await page.evaluate(() => delete document.documentElement.dataset.answer);
  await page.fill("#text", text);
  await page.tap("#send");
  await page.waitForFunction(() => document.documentElement.dataset.answer || !document.getElementById("trouble").hidden);
  const answer = await data("answer");
  await page.waitForSelector("#send:visible");
  return answer ? JSON.parse(answer) : { trouble: await page.textContent("#trouble") };
}

const scenarios = {
  async chat() {
    await open();
    await whole("start");
    const turns = [];
    for (const text of given.texts) turns.push(await ask(text));
    await whole("chat");
    const shown = await page.locator("#messages li").allTextContents();
    const speed = await page.textContent("#speed");
    const wide = await overflow();
    const first = fetched;
    fetched = [];
    await open(); // a reload
    const about = await page.textContent("#about");
    const again = await ask(given.texts[0]);
    return { turns, shown, speed, overflow: wide, small: await small(), first, about, again, second: fetched };
  },
  async call() {
    await open();
    const turn = await ask(given.texts[0]);
    await whole(`call-${given.width}${given.dark ? "-dark" : ""}`);
    const trouble = await page.textContent("#trouble");
    const about = await page.textContent("#about");
    const cards = await page.locator("#messages .call section").allInnerTexts();
    return { turn, cards, trouble, about, overflow: await overflow() };
  },
  async stop() {
    await open();
    // From inside the page: a tiny model is done before a finger could come.
    await page.evaluate(() => {
      const seen = () => document.querySelector("#messages li:not(.user)")?.textContent && document.getElementById("stop").click();
      new MutationObserver(seen).observe(document.getElementById("messages"), { childList: true, subtree: true });
    });
    await page.fill("#text", given.texts[0]);
    await page.tap("#send");
    await page.waitForFunction(() => document.documentElement.dataset.answer);
    const stopped = JSON.parse(await data("answer"));
    await page.waitForSelector("#send:visible");
    await open();
    const first = await ask(given.texts[0]);
    await page.tap("#fresh");
    await page.waitForFunction(() => !document.querySelector("#messages li"));
    return { stopped, first, again: await ask(given.texts[0]) };
  },
  async bench() {
    await open();
    await page.tap("#tab-bench");
    await page.tap("#start");
    await page.waitForFunction(() => !document.getElementById("working").hidden);
    await whole("working");
    await page.waitForFunction(() => document.documentElement.dataset.measured || !document.getElementById("trouble").hidden);
    await page.waitForSelector("#start:visible");
    await whole("bench");
    await page.tap("summary");
    await whole("device");
    const sent = await page.textContent("#sent");
    return { sent, overflow: await overflow(), small: await small(), results: await page.textContent("#results") };
  },
  async plain() {
    await open();
    const facts = await page.evaluate(() => [isSecureContext, crossOriginIsolated, document.getElementById("threads").length]);
    const checked = await page.textContent("#checked");
    return { facts, checked, turn: await ask(given.texts[0]) };
  },
  async unable() {
    await page.addInitScript(() => (WebAssembly.validate = () => false));
    await open();
    await picture("unable");
    return { fault: await page.textContent("#fault"), main: await page.isVisible("#main") };
  },
  async damaged() {
    await context.route("**/tokenizer.json", async (route) => {
      const answer = await route.fetch();
      const body = await answer.body();
      body[body.length >> 1] ^= 1;
      await route.fulfill({ response: answer, body });
    });
    await open();
    const turn = await ask(given.texts[0]);
    await picture("damaged");
    await context.unrouteAll();
    return { turn, again: await ask(given.texts[0]) };
  },
};

try {
  const found = await scenarios[given.scenario]();
  console.log(JSON.stringify({ ...found, complaints }));
} finally {
  await browser.close();
}
