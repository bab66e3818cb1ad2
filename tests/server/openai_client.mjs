// OpenAI's JavaScript client over every endpoint; what it heard goes to standard output as JSON.
// Run as: node openai_client.mjs URL OPENAI_MODULE, with what is asked in the environment.

import { pathToFileURL } from "node:url";

const [url, module] = process.argv.slice(2);
const { default: OpenAI, toFile } = await import(pathToFileURL(module).href);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.KEY, maxRetries: 0 });
const model = process.env.MODEL;
const messages = [{ role: "user", content: "Who keeps the lighthouse?" }];
const tool = JSON.parse(process.env.TOOL);
const heard = {};

heard.models = (await client.models.list()).data.map((one) => one.id);

const completion = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 24, logprobs: 1 });
heard.completion = completion.choices[0].text;
heard.tokens = completion.choices[0].logprobs.tokens.join("");

heard.completionStream = "";
for await (const chunk of await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 24, stream: true }))
  heard.completionStream += chunk.choices[0].text;

const chat = await client.chat.completions.create({ model, messages, max_tokens: 24 });
heard.chat = chat.choices[0].message.content;
heard.usage = chat.usage.total_tokens;

const stream = client.chat.completions.stream({ model, messages, max_tokens: 24, stream_options: { include_usage: true } });
heard.chatStream = "";
stream.on("content", (delta) => (heard.chatStream += delta));
heard.chatStreamUsage = (await stream.totalUsage()).total_tokens;

const called = client.chat.completions.stream({ model, messages, tools: [tool], tool_choice: "required", max_tokens: 200 });
heard.calls = (await called.finalChatCompletion()).choices[0].message.tool_calls.map((one) => one.function);

const events = [];
const form = { type: "json_schema", name: "answer", schema: tool.function.parameters };
const responding = client.responses.stream({ model, input: "Add one and two.", text: { format: form }, max_output_tokens: 200 });
for await (const event of responding) events.push(event.type);
heard.events = [events[0], events.at(-1)];
heard.response = (await responding.finalResponse()).output_text;

heard.errors = [];
for (const options of [{ n: 2 }, { model: "gpt-5" }, { max_tokens: 100000 }])
  await client.chat.completions.create({ model, messages, ...options }).catch((error) =>
    heard.errors.push([error.status, error.type, error.param ?? null]));
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
await stranger.models.list().catch((error) => heard.errors.push([error.status, error.type, error.param ?? null]));

const leaving = await client.chat.completions.create({ model, messages, max_tokens: 1900, stream: true, logit_bias: JSON.parse(process.env.ENDLESS) });
for await (const chunk of leaving) if (chunk.choices[0].delta.content) break;
leaving.controller.abort();

const given = await client.post("/documents", {
  body: await (async () => {
    const parts = new FormData();
    parts.append("file", await toFile(Buffer.from(process.env.BOOK), "book.txt"));
    return parts;
  })(),
});
heard.document = [given.object, given.name];
const asked = await client.chat.completions.create({ model, messages, max_tokens: 8, document: given.id });
heard.quotes = Array.isArray(asked.quotes);

console.log(JSON.stringify(heard));
