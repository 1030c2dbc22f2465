// One open session with its cache: the loop of export/runner/runner.py, in WebAssembly.
//
// What is timed means the same as there: `ttft_ms` from handing over the prompt to knowing the first token,
// then one entry of `token_ms` for each further token. No tokenizer, no sampling (argmax), no early end, and
// nothing else happens in the worker meanwhile. The cache grows with each step: onnxruntime-web has no way to
// write into a tensor that stays in its memory.

// The heaps of this worker, so that their size can be told. They only grow.
const heaps = [];
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(descriptor) {
    super(descriptor);
    heaps.push(this);
  }
};

import { likelihood } from "./score.js";

const SCORED_AT_ONCE = 64; // tokens of a step: their logits take 13 MB with a vocabulary of 49,152
const VENDOR = new URL("./vendor/onnxruntime-web/", import.meta.url).href;
const SESSION = {
  executionProviders: ["wasm"],
  // Weights stored as QuantizeLinear pairs are unfolded once, at load, and not at every step.
  extra: { session: { disable_quant_qdq: "1" } },
};
// A graph of one Identity (opset 13), for making the runtime ready before anything is timed.
const NOTHING =
  "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0=";

let ort = null;

/** Load and compile the runtime with this many threads; once in a worker. Resolves to {version, seconds}. */
export async function start(threads) {
  const started = performance.now();
  ort = await import("./vendor/onnxruntime-web/ort.wasm.min.mjs");
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = {
    mjs: `${VENDOR}ort-wasm-simd-threaded.mjs`,
    wasm: `${VENDOR}ort-wasm-simd-threaded.wasm`,
  };
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.proxy = false;
  const graph = Uint8Array.from(atob(NOTHING), (character) => character.charCodeAt(0));
  await (await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] })).release();
  return { version: ort.env.versions.web, seconds: (performance.now() - started) / 1000 };
}

/** Bytes of this worker's WebAssembly heaps: their peak, as they never shrink. */
export function heapBytes() {
  const sizes = heaps.map((heap) => heap.buffer.byteLength);
  return sizes.length ? sizes.reduce((sum, size) => sum + size, 0) : null;
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

export class Decoder {
  /**
   * Open a graph: `read(name)` gives a file of the bundle, `external` the names of its weights as the graph
   * has them, `config` the bundle's configuration for sizes that the graph leaves open.
   */
  static async open({ graph, external, read, config }) {
    const folder = graph.slice(0, graph.lastIndexOf("/") + 1);
    const started = performance.now();
    const externalData = [];
    for (const path of external) externalData.push({ path, data: await read(folder + path) });
    const session = await ort.InferenceSession.create(await read(graph), { ...SESSION, externalData });
    return new Decoder(session, config, (performance.now() - started) / 1000);
  }

  constructor(session, config, load_s) {
    this.session = session;
    this.load_s = load_s;
    const inputs = Object.fromEntries(session.inputMetadata.map((value) => [value.name, value]));
    const outputs = Object.fromEntries(session.outputMetadata.map((value) => [value.name, value]));
    this.cache = []; // [past, present]
    for (const kind of ["key", "value"]) {
      for (let layer = 0; `past_key_values.${layer}.${kind}` in inputs; layer++) {
        this.cache.push([`past_key_values.${layer}.${kind}`, `present.${layer}.${kind}`]);
      }
    }
    const fed = new Set([...this.cache.map(([past]) => past), "input_ids", "attention_mask", "position_ids"]);
    const unknown = Object.keys(inputs).filter((name) => !fed.has(name));
    const missing = ["logits", ...this.cache.map(([, present]) => present)].filter((name) => !(name in outputs));
    if (unknown.length || missing.length || !this.cache.length || !("input_ids" in inputs)) {
      throw new Error(
        `Not a decoder graph with a cache: unknown inputs [${unknown}], missing outputs [${missing}].`,
      );
    }
    this.inputs = inputs;
    const past = inputs[this.cache[0][0]];
    this.type = past.type;
    const number = (found, ...others) => [found, ...others].find((value) => Number.isInteger(value) && value > 0);
    const genai = config.genai.model?.decoder ?? {};
    const hidden = config.model.hidden_size / config.model.num_attention_heads;
    this.heads = number(past.shape[1], genai.num_key_value_heads, config.model.num_key_value_heads);
    this.headSize = number(past.shape[3], genai.head_size, config.model.head_dim, hidden);
    this.vocabSize = number(outputs.logits.shape[2], config.genai.model?.vocab_size, config.model.vocab_size);
    if (!this.heads || !this.headSize || !this.vocabSize) {
      throw new Error("Neither the graph nor its configuration tells the sizes of cache and vocabulary.");
    }
    this.lastAlone = outputs.logits.shape[1] === 1; // a graph that gives the last token's logits alone
    this.itemBytes = this.type === "float16" ? 2 : 4;
    this.fetches = ["logits", ...this.cache.map(([, present]) => present)];
  }

  /** What does not change from repetition to repetition. */
  facts() {
    return { kv_cache_bytes_per_position: this.cache.length * this.heads * this.headSize * this.itemBytes };
  }

  /** The cache of no tokens. */
  empty() {
    const none = this.type === "float16" ? new Uint16Array(0) : new Float32Array(0);
    const shape = [1, this.heads, 0, this.headSize];
    return Object.fromEntries(this.cache.map(([past]) => [past, new ort.Tensor(this.type, none, shape)]));
  }

  /** Compute `ids` after the `total - ids.length` positions in `past`: {token, logits, past}, token the likeliest. */
  async step(ids, total, past) {
    const feeds = { ...past };
    const count = ids.length;
    feeds.input_ids = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, count]);
    if ("attention_mask" in this.inputs) {
      feeds.attention_mask = new ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]);
    }
    if ("position_ids" in this.inputs) {
      const places = BigInt64Array.from({ length: count }, (_, i) => BigInt(total - count + i));
      feeds.position_ids = new ort.Tensor("int64", places, [1, count]);
    }
    const made = await this.session.run(feeds, this.fetches);
    const logits = made.logits.data;
    const token = argmax(logits.subarray(logits.length - this.vocabSize));
    return { token, logits, past: Object.fromEntries(this.cache.map(([name, present]) => [name, made[present]])) };
  }

  /** Time `generate` greedy tokens after `prompt` (ids). */
  async time(prompt, generate) {
    const times = [];
    const tokens = [];
    let ids = prompt;
    let total = prompt.length;
    let past = this.empty();
    const started = performance.now();
    let before = started;
    for (let i = 0; i < generate; i++) {
      const made = await this.step(ids, total, past);
      const now = performance.now();
      times.push(now - before);
      before = now;
      tokens.push(made.token);
      past = made.past;
      ids = [made.token];
      total += 1;
    }
    const [ttft_ms, ...token_ms] = times;
    return { ttft_ms, token_ms, tokens, wall_s: (before - started) / 1000, heap_bytes: heapBytes() };
  }

  /**
   * Compute `ids` after `start` positions in `past`, some at a time; `heard(logits)` takes the logits after each,
   * in their order. Resolves to the cache that holds them too.
   */
  async follow(ids, start, past, heard) {
    const most = this.lastAlone ? 1 : SCORED_AT_ONCE;
    for (let at = 0; at < ids.length; at += most) {
      const part = ids.slice(at, at + most);
      const made = await this.step(part, start + at + part.length, past);
      for (let i = 0; i < part.length; i++) heard(made.logits.subarray(i * this.vocabSize, (i + 1) * this.vocabSize));
      past = made.past;
    }
    return past;
  }

  /** [sum of log-probabilities, all greedy] of each [context, continuation]; equal contexts are computed once. */
  async score(requests) {
    const found = [];
    let known = null;
    let past = null;
    let after = null;
    for (const [context, continuation] of requests) {
      const same = known?.length === context.length && known.every((id, i) => id === context[i]);
      if (!same) {
        past = await this.follow(context, 0, this.empty(), (logits) => (after = logits));
        known = context;
      }
      let [sum, greedy] = likelihood(after, continuation[0]);
      let place = 0;
      await this.follow(continuation.slice(0, -1), context.length, past, (logits) => {
        const [value, likeliest] = likelihood(logits, continuation[++place]);
        sum += value;
        greedy &&= likeliest;
      });
      found.push([sum, greedy]);
    }
    return found;
  }

  /** The first `length` positions of a cache of `total`: for going on from the beginning of a conversation. */
  shortened(past, length) {
    const cut = ([name, tensor]) => {
      const total = tensor.dims[2];
      const kept = new tensor.data.constructor(this.heads * length * this.headSize);
      for (let head = 0; head < this.heads; head++) {
        const from = head * total * this.headSize;
        kept.set(tensor.data.subarray(from, from + length * this.headSize), head * length * this.headSize);
      }
      return [name, new ort.Tensor(this.type, kept, [1, this.heads, length, this.headSize])];
    };
    return Object.fromEntries(Object.entries(past).map(cut));
  }
}
