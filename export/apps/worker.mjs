// new Worker("/worker.mjs", { type: "module" })
import { env, pipeline, TextStreamer } from "/node_modules/@huggingface/transformers/dist/transformers.min.js";

env.allowRemoteModels = false;
env.allowLocalModels = true; // off by default in browsers
env.localModelPath = "/models/";
env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/"; // by default a public server
env.backends.onnx.wasm.numThreads = 1;

let opened;
self.onmessage = async ({ data: { name, messages, tools, most } }) => {
  try {
    const progress_callback = ({ file, progress }) => self.postMessage({ file, progress });
    opened ??= pipeline("text-generation", name, { device: "wasm", dtype: "q4", progress_callback });
    const generate = await opened;
    const callback_function = (piece) => self.postMessage({ piece });
    const shown = { skip_prompt: true, skip_special_tokens: true, callback_function };
    const streamer = new TextStreamer(generate.tokenizer, shown);
    const [answer] = await generate(messages, { tools, max_new_tokens: most, do_sample: false, streamer });
    self.postMessage({ messages: answer.generated_text });
  } catch (error) {
    self.postMessage({ error: String(error) });
  }
};
