// Answers from a bundle in React Native: docs/phone_app.md. tests/slow/test_phone_app.py runs it with onnxruntime-node.

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { InferenceSession, Tensor } from "onnxruntime-react-native";

/** `read(name)` resolves to the text of a file of the bundle in `folder`. */
export async function open(folder, read) {
  const [app, settings, vocabulary, { model }] = await Promise.all(
    ["app.json", "tokenizer_config.json", "tokenizer.json", "genai_config.json"].map(async (name) => JSON.parse(await read(name))),
  );
  const options = { executionProviders: ["cpu"], intraOpNumThreads: 4 };
  const session = await InferenceSession.create(`${folder}/model.onnx`, options);
  const special = vocabulary.added_tokens.filter((token) => token.special).map((token) => token.content);
  special.sort((a, b) => b.length - a.length);
  return { session, app, model, settings, special, tokenizer: new Tokenizer(vocabulary, settings) };
}

/** The answer to `conversation`, of at most `most` tokens; `piece` takes its text as it comes. */
export async function answer({ session, app, model, settings, special, tokenizer }, conversation, most, piece) {
  const { num_hidden_layers: layers, num_key_value_heads: heads, head_size: size } = model.decoder;
  const escaped = (text) => special.reduce((all, token) => all.replaceAll(token, `${token[0]} ${token.slice(1)}`), text);
  const system = app.system ? [{ role: "system", content: app.system }] : [];
  const messages = [...system, ...conversation].map((message) => ({ ...message, content: escaped(message.content) }));
  const { tools } = app;
  const words = { messages, tools, bos_token: settings.bos_token, eos_token: settings.eos_token, add_generation_prompt: true };
  const prompt = new Template(settings.chat_template).render(words);
  let next = tokenizer.encode(prompt, { add_special_tokens: false }).ids;
  let past = {};
  for (let layer = 0; layer < layers; layer++)
    for (const kind of ["key", "value"])
      past[`past_key_values.${layer}.${kind}`] = new Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
  const tokens = [];
  let [total, shown] = [0, ""];
  while (tokens.length < most) {
    total += next.length;
    const made = await session.run({
      input_ids: new Tensor("int64", BigInt64Array.from(next, BigInt), [1, next.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      ...past,
    });
    const logits = made.logits.data.subarray(-model.vocab_size); // of the last position
    const token = logits.reduce((best, value, id) => (value > logits[best] ? id : best), 0);
    if (app.stop.ids.includes(token)) break;
    tokens.push((next = [token])[0]);
    for (const name of Object.keys(past)) past[name] = made[name.replace("past_key_values", "present")];
    const text = tokenizer.decode(tokens, { skip_special_tokens: true });
    if (text.endsWith("\ufffd")) continue; // half a letter
    piece(text.slice(shown.length));
    shown = text;
  }
  return shown;
}
