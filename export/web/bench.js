// The benchmark: bundles in turns, A B B A, each in its own worker, one at a time.
//
// If all bundles fit into memory together they stay open; else each is loaded, warmed up and closed again for
// its turn, which takes longer and is recorded (`open_together`). After every turn all figures so far are sent, so
// that a phone that gives up in the middle leaves what it measured.

import { memoryBudget } from "./device.js";

const TEMPLATE_MS = 10_000;

export class Bundle {
  /** A worker with one bundle. `heard` takes its events. */
  constructor(bundle, threads, heard) {
    this.bundle = bundle;
    this.worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
    this.waiting = new Map();
    this.count = 0;
    this.worker.onmessage = ({ data }) => {
      if (data.event === "encoding") return this.watch();
      if (data.event === "encoded") return clearTimeout(this.timer);
      if (data.event) return heard(data);
      const { resolve, reject } = this.waiting.get(data.id);
      this.waiting.delete(data.id);
      if ("error" in data) reject(new Error(data.error));
      else resolve(data.answer);
    };
    this.worker.onerror = (event) => {
      event.preventDefault();
      this.fail(new Error(event.message || "The worker could not be started."));
    };
    this.opened = this.ask("open", { bundle, threads });
    this.opened.catch(() => {}); // whoever waits for it is told
  }

  ask(ask, content = {}) {
    const id = ++this.count;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, ask, ...content });
    });
  }

  /** A chat template is a program of the bundle's: a worker that does not come back from it is ended. */
  watch() {
    this.timer = setTimeout(() => {
      this.ended = true;
      this.close("The bundle's chat template does not end; the bundle was closed.");
    }, TEMPLATE_MS);
  }

  stop() {
    this.worker.postMessage({ ask: "stop" });
  }

  fail(error) {
    for (const { reject } of this.waiting.values()) reject(error);
    this.waiting.clear();
  }

  close(reason = "closed") {
    clearTimeout(this.timer);
    this.worker.terminate();
    this.fail(new Error(reason));
  }
}

/** Whether all bundles may be open at the same time. */
export function fitTogether(plan) {
  const needed = plan.bundles.reduce((sum, bundle) => sum + bundle.expected_memory_bytes, 0);
  return plan.bundles.length === 1 || needed <= (plan.memory_bytes ?? memoryBudget());
}

/**
 * Time the plan's bundles. `made(label)` gives a fresh Bundle, `step(done, total, note)` is awaited before
 * each piece of work, `told(result)` after each turn, `cancelled()` is asked between turns. Resolves to
 * {open_together, loaded, repetitions, runtime}.
 */
export async function benchmark(plan, { made, step, told, cancelled }) {
  const { generate, warmup, pause_s } = plan.options;
  const open_together = fitTogether(plan);
  const prompts = Object.fromEntries(plan.bundles.map((bundle) => [bundle.label, bundle.prompt_ids]));
  const result = { open_together, loaded: [], repetitions: [], runtime: "" };
  const open = new Map();
  const total = plan.turns.length + plan.bundles.length;
  let hidden = document.hidden;
  const watch = () => (hidden ||= document.hidden);
  document.addEventListener("visibilitychange", watch);

  async function opened(label) {
    if (open.has(label)) return open.get(label);
    if (!open_together) {
      for (const other of open.values()) other.close();
      open.clear();
    }
    const bundle = made(label);
    open.set(label, bundle);
    const facts = await bundle.opened;
    const known = result.loaded.find((entry) => entry.label === label);
    if (known) known.load_s.push(facts.load_s);
    else {
      const { load_s, kv_cache_bytes_per_position } = facts;
      result.loaded.push({ label, load_s: [load_s], kv_cache_bytes_per_position });
      result.runtime = facts.runtime;
    }
    for (let i = 0; i < warmup; i++) await bundle.ask("time", { prompt: prompts[label], generate });
    return bundle;
  }

  try {
    let done = 0;
    if (open_together) {
      for (const { label } of plan.bundles) {
        await step(done++, total, `${label}: load and warm up`);
        await opened(label);
        if (cancelled()) return result;
      }
    }
    for (const [turn, [repetition, label]] of plan.turns.entries()) {
      if (!open_together && !open.has(label)) await step(done, total, `${label}: load and warm up`);
      const bundle = await opened(label);
      if (turn && pause_s) await new Promise((resolve) => setTimeout(resolve, pause_s * 1000));
      await step(done++, total, `${label}: repetition ${repetition + 1} of ${plan.options.repetitions}`);
      if (cancelled()) return result;
      hidden = document.hidden;
      const timed = await bundle.ask("time", { prompt: prompts[label], generate });
      result.repetitions.push({ label, repetition, turn, ...timed, hidden });
      await told(result);
    }
    return result;
  } finally {
    document.removeEventListener("visibilitychange", watch);
    for (const bundle of open.values()) bundle.close();
  }
}

const median = (values) => percentile(values, 0.5);

/** The value below which `share` of the values lie, linear between neighbours. */
export function percentile(values, share) {
  const ordered = [...values].sort((a, b) => a - b);
  const place = (ordered.length - 1) * share;
  const low = Math.floor(place);
  const high = Math.min(low + 1, ordered.length - 1);
  return ordered[low] + (ordered[high] - ordered[low]) * (place - low);
}

/** Medians of one bundle's repetitions, for the screen; the computer makes its own of the raw times. */
export function figures(own, prompt) {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const pooled = own.flatMap((repetition) => repetition.token_ms);
  return {
    repetitions: own.length,
    ttft_ms: median(own.map((repetition) => repetition.ttft_ms)),
    prefill_tokens_per_s: median(own.map((repetition) => (prompt / repetition.ttft_ms) * 1000)),
    decode_tokens_per_s: median(own.map(({ token_ms }) => (token_ms.length / sum(token_ms)) * 1000)),
    token_ms_p50: percentile(pooled, 0.5),
    token_ms_p90: percentile(pooled, 0.9),
    heap_bytes: own.at(-1).heap_bytes,
  };
}
