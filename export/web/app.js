// The page: choose a bundle, chat with it, benchmark all of them. What it shows is made of text nodes alone.

import { Bundle, benchmark, figures, fitTogether } from "./bench.js";
import { describe, explained, missing, mostThreads } from "./device.js";
import { itemsOf, scoreAll } from "./score.js";
import { forget, kept } from "./store.js";

const FORM = 2; // of the plan
const at = (id) => document.getElementById(id);
const show = (id, shown) => (at(id).hidden = !shown);
const megabytes = (bytes) =>
  bytes < 1e5 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const asked = new URLSearchParams(location.search);

let plan = null;
let current = null; // the bundle that is open for chat
let cancelled = false;
let busy = false;

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

function fault(message) {
  at("fault").textContent = message;
  show("fault", true);
  show("main", false);
}

function trouble(message) {
  at("trouble").textContent = message;
  show("trouble", Boolean(message));
}

function working(text, done = 0, total = 0) {
  show("working", Boolean(text));
  at("working-text").textContent = text;
  if (total) at("working-bar").value = Math.min(1, done / total);
  else at("working-bar").removeAttribute("value"); // no end known: the bar moves
}

function setBusy(now) {
  busy = now;
  for (const id of ["bundle", "threads", "start", "send", "forget"]) at(id).disabled = now;
}

const threads = () => Number(at("threads").value);
const chosen = () => plan.bundles[Number(at("bundle").value)];

/** A worker for a bundle, whose progress is shown. */
function opening(bundle) {
  return new Bundle(bundle, threads(), (event) => {
    if (event.event === "piece") return piece(event.text);
    if (event.event === "checked") return checked(event);
    const { done, total } = event;
    if (event.stage === "download") {
      working(`Fetching ${bundle.label}: ${megabytes(done)} of ${megabytes(total)}`, done, total);
    } else working(`Loading ${bundle.label} …`);
  });
}

// ------------------------------------------------------------------ chat

let answer = null;
let arrived = "";

/** A tool call is shown when it is whole: an answer that begins as one waits. */
function piece(text) {
  if (!answer) return;
  arrived += text;
  if (/^\s*([[{<]|$)/.test(arrived)) return;
  answer.classList.remove("waiting");
  answer.textContent = arrived;
  keepInView();
}

/** One card for each call: the function's name, and its arguments. */
function cards(calls) {
  return calls.map((call) => {
    const card = element("section");
    const values = Object.entries(call.arguments).map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]);
    card.append(element("h2", call.name), rows(element("dl"), values));
    return card;
  });
}

function checked({ count, difference }) {
  if (difference) trouble(`The prompt of app.json has other ids on this page than in training: ${difference}.`);
  else if (count) current.checked = `; prompts as in training, ${count} of ${count} ids`;
}

function keepInView() {
  const left = document.documentElement.scrollHeight - innerHeight - scrollY;
  if (left < 240) scrollTo(0, document.documentElement.scrollHeight);
}

function say(text, className) {
  const made = element("li", text, className);
  at("messages").append(made);
  keepInView();
  return made;
}

function closeChat() {
  current?.close();
  current = null;
  at("messages").replaceChildren();
  at("speed").textContent = "";
  show("fresh", false);
}

async function send(text) {
  trouble("");
  setBusy(true);
  const question = say(text, "user");
  show("send", false);
  show("stop", true);
  try {
    current ??= opening(chosen());
    const opened = await current.opened;
    working("");
    refreshKept(); // what was fetched is here now
    if (!opened.kept) say("No room to keep the bundle: a reload fetches it again.", "note");
    answer = say("", "waiting");
    arrived = "";
    const turn = await current.ask("chat", { text });
    if (turn.calls) answer.classList.add("call");
    answer.replaceChildren(...(turn.calls ? cards(turn.calls) : [turn.text]));
    keepInView();
    if (!turn.template && !current.raw) {
      current.raw = true;
      question.before(element("li", "This bundle has no chat template: your text is continued as it stands.", "note"));
    }
    if (turn.dropped_turns) question.before(element("li", "The oldest turns no longer fit and were left out.", "note"));
    if (turn.reason === "length") say("The answer was cut at its longest.", "note");
    const speed = turn.decode_tokens_per_s ? `, then ${turn.decode_tokens_per_s.toFixed(1)} tokens/s` : "";
    at("speed").textContent = `${turn.tokens.length} tokens, the first after ${turn.ttft_ms.toFixed(0)} ms${speed}`;
    document.documentElement.dataset.answer = JSON.stringify(turn); // for tests
  } catch (error) {
    answer?.remove();
    question.remove();
    at("text").value ||= text; // not lost
    trouble(explained(error.message, chosen().expected_memory_bytes));
    if (current && (current.ended || (await failed(current.opened)))) {
      current.close();
      current = null;
    }
  }
  answer?.classList.remove("waiting");
  answer = null;
  working("");
  show("send", true);
  show("stop", false);
  show("fresh", at("messages").childElementCount > 0);
  setBusy(false);
  refreshKept();
}

const failed = (promise) => promise.then(() => false, () => true);

// ------------------------------------------------------------------ benchmark

const run = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const NOTHING = { complete: false, open_together: true, device: null, loaded: [], repetitions: [], answers: {}, done: 0, total: 0, note: "", trouble: null };
let measured = NOTHING; // all that is known; each sending replaces the one before

/** Send all that was measured, with these changes; false if the computer cannot be reached or refuses. */
async function report(changes) {
  measured = { ...measured, ...changes };
  try {
    const body = JSON.stringify({ run, ...measured });
    const headers = { "Content-Type": "application/json" };
    return (await fetch("report", { method: "POST", headers, body })).ok;
  } catch {
    if (asked.get("run") === "bench") close(); // a headless browser whose program was killed ends with its page
    return false;
  }
}

/** The screen stays on, where the browser allows it. */
async function awake() {
  try {
    return await navigator.wakeLock?.request("screen");
  } catch {
    return null;
  }
}

async function measure() {
  trouble("");
  closeChat();
  setBusy(true);
  cancelled = false;
  show("start", false);
  show("cancel", true);
  at("results").replaceChildren();
  at("sent").textContent = "";
  const lock = await awake();
  measured = NOTHING;
  const common = {
    made: (label) => opening(plan.bundles.find((bundle) => bundle.label === label)),
    step: async (done, total, note) => {
      working(note, done, total);
      await report({ done, total, note });
    },
    cancelled: () => cancelled,
  };
  try {
    const result = await benchmark(plan, {
      ...common,
      told: async ({ open_together, loaded, repetitions, runtime }) => {
        const device = measured.device ?? (await describe(threads(), runtime));
        await report({ open_together, device, loaded, repetitions });
        showResults({ loaded, repetitions });
      },
    });
    let complete = result.repetitions.length === plan.turns.length;
    if (complete && itemsOf(plan)) {
      const told = (label, answers) => (measured = { ...measured, answers: { ...measured.answers, [label]: answers } });
      complete = await scoreAll(plan, { ...common, told });
    }
    const arrived = await report({ complete });
    at("sent").textContent = !complete
      ? "Cancelled."
      : arrived
        ? "Done. The figures are on the computer."
        : "Done, but the computer could not be reached: the figures are on this page alone.";
    document.documentElement.dataset.measured = complete ? "complete" : "cancelled"; // for tests
  } catch (error) {
    const bundle = plan.bundles.reduce((a, b) => (a.expected_memory_bytes > b.expected_memory_bytes ? a : b));
    const message = explained(error.message, bundle.expected_memory_bytes);
    trouble(message);
    await report({ trouble: message.slice(0, 500) });
  }
  await lock?.release();
  working("");
  show("start", true);
  show("cancel", false);
  setBusy(false);
  refreshKept();
}

function rows(list, entries) {
  list.replaceChildren(...entries.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  return list;
}

function showResults(result) {
  const cards = result.loaded.map((loaded) => {
    const own = result.repetitions.filter((repetition) => repetition.label === loaded.label);
    const card = element("section", "", "card");
    card.append(element("h2", loaded.label));
    if (!own.length) return card;
    const found = figures(own, plan.options.prompt);
    const load_s = Math.max(...loaded.load_s);
    card.append(
      rows(element("dl"), [
        ["decode", `${found.decode_tokens_per_s.toFixed(1)} tokens/s`],
        ["prefill", `${found.prefill_tokens_per_s.toFixed(0)} tokens/s`],
        ["first token", `${found.ttft_ms.toFixed(0)} ms`],
        ["token, p50", `${found.token_ms_p50.toFixed(1)} ms`],
        ["token, p90", `${found.token_ms_p90.toFixed(1)} ms`],
        ["load", `${load_s.toFixed(2)} s`],
        ["heap", found.heap_bytes ? megabytes(found.heap_bytes) : "not told"],
        ["repetitions", `${found.repetitions} of ${plan.options.repetitions}`],
      ]),
    );
    return card;
  });
  at("results").replaceChildren(...cards);
}

// ------------------------------------------------------------------ around them

async function refreshKept() {
  const known = await kept();
  const files = new Map(plan.bundles.flatMap((bundle) => Object.values(bundle.files).map((file) => [file.sha256, file])));
  const here = [...files.values()].filter((file) => known.has(file.sha256));
  const bytes = here.reduce((sum, file) => sum + file.size_bytes, 0);
  const others = [...known].filter((sha256) => !files.has(sha256)).length;
  const more = others ? `, and ${others} files of other bundles` : "";
  at("kept").textContent = bytes || others ? `Kept in this browser: ${megabytes(bytes)}${more}.` : "Nothing is kept yet.";
  show("forget", known.size > 0);
  const bundle = chosen();
  const left = Object.values(bundle.files).filter((file) => !known.has(file.sha256));
  const missing = left.reduce((sum, file) => sum + file.size_bytes, 0);
  const all = megabytes(bundle.download_bytes);
  const part = missing === bundle.download_bytes ? `${all} to fetch` : `${all}, ${megabytes(missing)} of it to fetch`;
  at("about").textContent = `${missing ? part : `${all}, all here already`}; needs about ${megabytes(bundle.expected_memory_bytes)} of memory${current?.checked ?? ""}`;
  const memory = navigator.deviceMemory;
  if (memory && bundle.expected_memory_bytes > memory * 2 ** 30 * 0.6) {
    at("about").textContent += `. This device tells ${memory} GB: it may not be enough`;
  }
}

function tab(name) {
  for (const one of ["chat", "bench"]) {
    show(one, one === name);
    at(`tab-${one}`).setAttribute("aria-selected", String(one === name));
  }
}

function fill() {
  plan.bundles.forEach((bundle, place) => at("bundle").append(new Option(bundle.label, String(place))));
  const most = mostThreads();
  for (let count = 1; count <= most; count++) at("threads").append(new Option(String(count), String(count)));
  at("threads").value = String(Math.min(plan.options.threads ?? 1, most));
  at("threads-about").textContent =
    most > 1
      ? "More threads read the prompt faster; single tokens often get slower."
      : "One thread: more need https (edgedisp phone --https) or localhost.";
  const { prompt, generate, repetitions } = plan.options;
  const together = fitTogether(plan) ? "" : " They do not fit into memory together, so each is loaded anew for its turn.";
  const scored = itemsOf(plan) ? ` Then ${itemsOf(plan)} items of tasks are scored.` : "";
  const names = plan.bundles.length > 1 ? `${plan.bundles.length} bundles in turns.${together}` : "";
  at("bench-about").textContent =
    `${prompt} prompt tokens, ${generate} new ones, ${repetitions} times after a warm-up.${scored} ${names} Keep this page in front and the screen on.`;
  at("checked").textContent = isSecureContext
    ? "Files are checked by SHA-256 on arrival."
    : "Files are checked by SHA-256, but over plain http the sums come on the same wire: damage is found, an attacker in your network is not.";
}

function wire() {
  at("tab-chat").onclick = () => tab("chat");
  at("tab-bench").onclick = () => tab("bench");
  at("bundle").onchange = () => {
    closeChat();
    refreshKept();
  };
  at("threads").onchange = closeChat;
  at("composer").onsubmit = (event) => {
    event.preventDefault();
    const text = at("text").value.trim();
    if (!text || busy) return;
    at("text").value = "";
    grow();
    send(text);
  };
  at("text").oninput = grow;
  at("text").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      at("composer").requestSubmit();
    }
  };
  at("stop").onclick = () => current?.stop();
  at("fresh").onclick = async () => {
    if (busy) return;
    await current?.ask("reset");
    at("messages").replaceChildren();
    at("speed").textContent = "";
    show("fresh", false);
  };
  at("start").onclick = measure;
  at("cancel").onclick = () => {
    cancelled = true;
    working("Ending after this repetition …");
  };
  at("forget").onclick = async () => {
    closeChat();
    await forget();
    refreshKept();
  };
}

function grow() {
  const box = at("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

async function main() {
  const lacking = missing();
  if (lacking) return fault(lacking);
  const answer = await fetch("plan.json", { cache: "no-store" }).catch(() => null);
  if (!answer?.ok) return fault("The computer does not answer. Is edgedisp phone still running? Then scan its code again.");
  plan = await answer.json();
  if (plan.form !== FORM) return fault("This page is older than the program on the computer. Reload it.");
  show("fault", false);
  show("main", true);
  fill();
  wire();
  await refreshKept();
  const facts = await describe(threads(), "");
  at("where").textContent = facts.model || "a language model on this device";
  rows(at("device"), [
    ["browser", facts.user_agent],
    ["cores", String(facts.cores ?? "not told")],
    ["memory", facts.device_memory_gb ? `${facts.device_memory_gb} GB` : "not told"],
    ["SIMD", facts.simd ? "yes" : "no"],
    ["isolated", facts.isolated ? "yes: threads possible" : "no: one thread"],
  ]);
  document.documentElement.dataset.ready = "yes"; // for tests
  if (asked.get("run") === "bench") {
    tab("bench");
    await measure();
  }
}

main().catch((error) => {
  fault(error.message);
  if (asked.get("run") === "bench") report({ trouble: error.message.slice(0, 500) });
});
