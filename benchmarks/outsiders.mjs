// node-llama-cpp, asked as `benchmarks/outsiders.py` says: a question a line of standard input, an answer a line.
// Arguments: the folder of node-llama-cpp, tokens to write. llama.cpp comes compiled with the package; nothing is
// compiled or fetched here.

import readline from "node:readline";
import { pathToFileURL } from "node:url";

const [, , folder, most] = process.argv;
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(`${folder}/dist/index.js`));
const llama = await getLlama({
  gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error, maxThreads: 1,
});

// The tokens of a text; `tokenize` puts no begin token before it
function tokens(model, text) {
  const begin = model.tokens.shouldPrependBosToken && model.tokens.bos !== null ? [model.tokens.bos] : [];
  return [...begin, ...model.tokenize(text, true)];
}

async function read({ path, window, prompts }) {
  const model = await llama.loadModel({ modelPath: path, gpuLayers: 0 });
  const texts = [], ids = [];
  for (const prompt of prompts) {
    const context = await model.createContext({ contextSize: window, threads: 1, flashAttention: false });
    const written = [];
    for await (const token of context.getSequence().evaluate(tokens(model, prompt), { temperature: 0 })) {
      written.push(token);
      if (written.length === Number(most)) break;
    }
    ids.push(written);
    texts.push(model.detokenize(written));
    await context.dispose();
  }
  const answer = { window: model.trainContextSize, texts, ids };
  await model.dispose();
  return answer;
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  const answer = await read(JSON.parse(line)).catch((error) => ({ error: String(error) }));
  console.log(`\nanswer: ${JSON.stringify(answer)}`);
}
process.exit(0);
