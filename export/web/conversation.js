// A conversation with an open bundle: chat template, tokenizer, context, streaming, as app.json says.
//
// The template turns all messages into text, the text into ids, and what the new ids share with the cache is
// not computed again. When the conversation outgrows the context, its oldest turns are left out (a system
// message stays), and the page is told. Greedy: the likeliest token is taken.

import { Tokenizer } from "./vendor/tokenizers/dist/tokenizers.min.mjs";
import { Template } from "./vendor/jinja/dist/index.js";

const ANSWER = 256;
// As in edgedisp/graph/genai_config.py, for bundles that were made without it or before it wrote all of them.
const TEXT_ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"];
const TURN_ENDS = ["<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>"];
const contentOf = (token) => (token && typeof token === "object" ? token.content : token);

/** Tool calls [{name, arguments}] that an answer consists of, in plain JSON or in <tool_call> tags; null of other text. */
export function toolCalls(text) {
  const tagged = [...text.matchAll(/<tool_call>([^]*?)<\/tool_call>/g)];
  if (text.replace(/<tool_call>[^]*?<\/tool_call>/g, "").trim() && tagged.length) return null;
  try {
    const calls = (tagged.length ? tagged.map((tag) => tag[1]) : [text]).flatMap((part) => JSON.parse(part));
    const isCall = (call) => typeof call?.name === "string" && call.arguments && typeof call.arguments === "object";
    return calls.length && calls.every(isCall) ? calls : null;
  } catch {
    return null;
  }
}

/** Let messages in, such as "stop". A timer would wait 4 ms. */
const channel = new MessageChannel();
function breathe() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
}

export class Conversation {
  /** `files`: parsed tokenizer, tokenizer_config, app.json, generation, model and genai configuration, template text. */
  constructor(decoder, files, context) {
    this.decoder = decoder;
    this.context = context;
    this.app = files.app;
    this.longest = Math.max(1, Math.min(files.app.max_new_tokens ?? ANSWER, Math.floor(context / 2)));
    const settings = files.tokenizerConfig;
    this.tokenizer = new Tokenizer(files.tokenizer, settings);
    const named = settings.chat_template;
    const listed = Array.isArray(named) ? named.find((one) => one.name === "default")?.template : named;
    const source = files.template ?? listed;
    this.template = source ? new Template(source) : null;
    this.dated = source?.includes("strftime_now"); // today's prompt is not that of the day of training
    const special = (files.tokenizer.added_tokens ?? []).filter((one) => one.special).map((one) => one.content);
    const longestFirst = special.sort((a, b) => b.length - a.length);
    this.written = longestFirst.map((one) => one.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
    this.special = {};
    for (const name of ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"]) {
      const text = contentOf(settings[name]);
      if (text) this.special[name] = text;
    }
    this.ends = this.endIds(files, source ?? "");
    this.reset();
  }

  /** Ids after which an answer ends: the configured ones, what ends a text, what ends a turn in the template. */
  endIds(files, source) {
    const told = [files.app.stop?.ids, files.genai.model?.eos_token_id, files.generation.eos_token_id, files.model.eos_token_id];
    const ids = new Set(told.flat().filter((id) => Number.isInteger(id)));
    const special = (files.tokenizer.added_tokens ?? []).filter((one) => one.special).map((one) => one.content);
    const turns = TURN_ENDS.filter((end) => source.includes(end));
    const texts = [this.special.eos_token, ...TEXT_ENDS.filter((end) => special.includes(end)), ...turns];
    for (const text of texts) {
      const id = text && this.tokenizer.token_to_id(text);
      if (Number.isInteger(id)) ids.add(id);
    }
    return ids;
  }

  reset() {
    this.messages = this.app.system ? [{ role: "system", content: this.app.system }] : [];
    this.cached = []; // ids whose keys and values are in `past`
    this.past = this.decoder.empty();
  }

  /** A text in which no special token is written, by the rule of app.json. */
  escaped(text = "") {
    return this.written ? text.replace(new RegExp(this.written, "gu"), (one) => one.replace(/^./u, "$& ")) : text;
  }

  /** The ids of app.json's example, made here: {count, difference}; difference: the first, in words, or null. */
  checked() {
    const { example } = this.app;
    if (!example?.prompt_ids) return { count: 0, difference: null };
    const expected = example.prompt_ids;
    const text = this.tokenizer.encode(example.prompt, { add_special_tokens: false }).ids;
    const ids = this.dated ? text : this.encode(example.messages, example.tools);
    const place = Array.from({ length: Math.max(ids.length, expected.length) }).findIndex((_, at) => ids[at] !== expected[at]);
    if (place < 0) return { count: expected.length, difference: null };
    const told = (id) => (id === undefined ? "nothing" : `${id} ${JSON.stringify(this.tokenizer.decode([id]))}`);
    const difference = `token ${place + 1} of ${expected.length} is ${told(ids[place])} here, ${told(expected[place])} in app.json`;
    return { count: expected.length, difference };
  }

  encode(written, tools = this.app.tools ?? null) {
    const escaped = (message) => ({ ...message, content: this.escaped(message.content) });
    let messages = this.template ? written.map(escaped) : written;
    if (this.app.system_role === "user" && messages[0]?.role === "system") {
      const [system, first, ...others] = messages;
      messages = [{ ...first, content: `${system.content}\n\n${first.content}` }, ...others];
    }
    const plain = (text) => this.tokenizer.encode(text, { add_special_tokens: false }).ids;
    if (this.template) {
      const context = { messages, add_generation_prompt: true, tools, documents: null, ...this.special };
      return plain(this.template.render(context));
    }
    // A text to continue begins with BOS where the tokenizer puts one, as in training.
    const ids = plain(messages.map((message) => message.content).join("\n"));
    const [bos] = this.tokenizer.encode("a").ids;
    return bos === plain("a")[0] || bos === ids[0] ? ids : [bos, ...ids];
  }

  /** Ids of the conversation with as many of its turns as fit: {ids, dropped}. Throws where none does. */
  fitting() {
    let dropped = 0;
    let messages = this.messages;
    for (;;) {
      const ids = this.encode(messages);
      if (ids.length + this.longest <= this.context) {
        this.messages = messages;
        return { ids, dropped };
      }
      const first = messages[0]?.role === "system" ? 1 : 0;
      if (messages.length - first < 3) {
        const most = this.context - this.longest;
        throw new Error(`This message has ${ids.length} tokens; at most ${most} fit into the context.`);
      }
      messages = [...messages.slice(0, first), ...messages.slice(first + 2)]; // a question and its answer
      dropped += 1;
    }
  }

  /**
   * Answer `text`: `encoded()` hears that the prompt is ready, `piece(text)` takes what is new, `stopped()` says
   * whether to end. Resolves to the figures of this turn; speeds are of the model alone.
   */
  async answer(text, encoded, piece, stopped) {
    this.messages = [...this.messages, { role: "user", content: text }];
    let begun;
    try {
      begun = this.fitting();
    } catch (error) {
      this.messages = this.messages.slice(0, -1); // the conversation goes on without it
      throw error;
    } finally {
      encoded();
    }
    const { ids, dropped } = begun;
    let shared = 0;
    while (shared < Math.min(this.cached.length, ids.length - 1) && this.cached[shared] === ids[shared]) shared++;
    if (shared < this.cached.length) this.past = this.decoder.shortened(this.past, shared);
    this.cached = ids.slice(0, shared);

    const tokens = [];
    let shown = "";
    let next = ids.slice(shared);
    let ttft_ms = 0;
    let later_ms = 0;
    let reason = "length";
    while (tokens.length < this.longest) {
      const before = performance.now();
      const made = await this.decoder.step(next, this.cached.length + next.length, this.past);
      const took = performance.now() - before;
      if (tokens.length) later_ms += took;
      else ttft_ms = took;
      this.cached.push(...next);
      this.past = made.past;
      tokens.push(made.token);
      if (this.ends.has(made.token)) {
        reason = "end";
        break;
      }
      next = [made.token];
      const all = this.tokenizer.decode(tokens, { skip_special_tokens: true });
      if (!all.endsWith("\ufffd")) {
        piece(all.slice(shown.length)); // a letter of several bytes waits until it is whole
        shown = all;
      }
      await breathe();
      if (stopped()) {
        reason = "stopped";
        break;
      }
    }
    const whole = this.tokenizer.decode(tokens, { skip_special_tokens: true });
    if (whole.length > shown.length) piece(whole.slice(shown.length));
    this.messages = [...this.messages, { role: "assistant", content: whole }];
    return {
      text: whole,
      calls: toolCalls(whole),
      tokens,
      prompt_tokens: ids.length,
      template: Boolean(this.template),
      reused_tokens: shared,
      ttft_ms,
      decode_tokens_per_s: tokens.length > 1 ? ((tokens.length - 1) / later_ms) * 1000 : null,
      dropped_turns: dropped,
      reason,
    };
  }
}
