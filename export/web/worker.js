// One bundle in a worker of its own: its session, its cache, its figures. The page stays free for touches.
//
// Messages in: {id, ask: "open" | "time" | "score" | "chat" | "reset", ...}, {ask: "stop"}. Out: {id, answer} or
// {id, error}, and on the way {event: "progress" | "encoding" | "checked" | "encoded" | "piece", ...}.

import { Conversation } from "./conversation.js";
import { Decoder, heapBytes, start } from "./decoder.js";
import { fetched } from "./store.js";

let decoder = null;
let conversation = null;
let runtime = null;
let stop = false;
const tell = (event, content) => postMessage({ event, ...content });

/** Fetch every file of the bundle; open the graph. */
async function open({ bundle, threads }) {
  const names = Object.keys(bundle.files);
  const files = {};
  let before = 0;
  let kept = true;
  for (const name of names) {
    let last = 0;
    files[name] = await fetched(bundle.files[name], (bytes) => {
      if (bytes - last < 1 << 20 && bytes < bundle.files[name].size_bytes) return;
      last = bytes;
      tell("progress", { stage: "download", done: before + bytes, total: bundle.download_bytes });
    });
    before += bundle.files[name].size_bytes;
    kept &&= files[name].kept;
  }
  tell("progress", { stage: "load", done: 0, total: 0 });
  const text = async (name) => (files[name] ? new TextDecoder().decode(await files[name].read()) : null);
  const json = async (name) => JSON.parse((await text(name)) ?? "{}");
  const config = { model: await json("config.json"), genai: await json("genai_config.json") };
  runtime ??= await start(threads);
  decoder = await Decoder.open({
    graph: bundle.graph,
    external: bundle.external,
    read: (name) => files[name].read(),
    config,
  });
  if (files["tokenizer.json"]) {
    const settings = {
      ...config,
      tokenizer: await json("tokenizer.json"),
      tokenizerConfig: await json("tokenizer_config.json"),
      generation: await json("generation_config.json"),
      app: await json("app.json"),
      template: await text("chat_template.jinja"),
    };
    conversation = () => new Conversation(decoder, settings, bundle.context);
  }
  return {
    ...decoder.facts(),
    load_s: decoder.load_s,
    runtime: `onnxruntime-web ${runtime.version}`,
    kept,
    heap_bytes: heapBytes(),
  };
}

/** Answer a message; the tokenizer is made and checked for the first one, so that a benchmark never pays for it. */
async function chat({ text }) {
  if (!conversation) throw new Error("This bundle has no tokenizer.json, so it cannot chat.");
  stop = false;
  tell("encoding");
  if (typeof conversation === "function") {
    conversation = conversation();
    tell("checked", conversation.checked());
  }
  return conversation.answer(
    text,
    () => tell("encoded"),
    (piece) => tell("piece", { text: piece }),
    () => stop,
  );
}

const ASKED = {
  open,
  chat,
  time: ({ prompt, generate }) => decoder.time(prompt, generate),
  score: ({ requests }) => decoder.score(requests),
  reset: () => typeof conversation === "object" && conversation?.reset(),
};

onmessage = async ({ data }) => {
  if (data.ask === "stop") {
    stop = true;
    return;
  }
  try {
    postMessage({ id: data.id, answer: await ASKED[data.ask](data) });
  } catch (error) {
    postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
};
