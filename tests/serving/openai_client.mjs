// OpenAI's own client for Node, unmodified: node openai_client.mjs URL FOLDER, where FOLDER/node_modules has it.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import test from "node:test";

const [url, folder] = process.argv.slice(2);
const { OpenAI } = createRequire(resolve(folder, "package.json"))("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const chat = { model: "tiny", messages: [{ role: "user", content: "Hi" }], seed: 1 };
const answer = {
  type: "object",
  properties: { good: { type: "boolean" }, grade: { enum: ["a", "b"] } },
  required: ["good", "grade"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "judge", strict: true, parameters: answer } }];
const call = { ...chat, tools, tool_choice: "required", parallel_tool_calls: false };

test("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names, ["tiny"]);
  assert.equal((await client.models.retrieve("tiny")).object, "model");
});

test("a chat completion with log-probabilities", async () => {
  const found = await client.chat.completions.create({
    ...chat, max_completion_tokens: 6, n: 2, logprobs: true, top_logprobs: 2,
  });
  assert.equal(found.choices.length, 2);
  assert.equal(found.choices[0].finish_reason, "length");
  assert.equal(found.choices[0].logprobs.content[5].top_logprobs.length, 2);
  assert.equal(found.usage.completion_tokens, 12);
});

test("streams, by chunks and by the helper, have the text of the whole completion", async () => {
  const body = { ...chat, structured_outputs: { regex: "[a-z]{4,12}" } };
  const whole = (await client.chat.completions.create(body)).choices[0].message.content;
  const pieces = [];
  let usage = null;
  const stream = await client.chat.completions.create({
    ...body, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    pieces.push(chunk.choices[0]?.delta?.content ?? "");
    usage = chunk.usage ?? usage;
  }
  assert.ok(pieces.length > 4);
  assert.equal(pieces.join(""), whole);
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
  assert.equal(await client.chat.completions.stream(body).finalContent(), whole);
});

test("structured output is parsed", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema: answer } };
  const found = await client.chat.completions.parse({ ...chat, response_format });
  assert.equal(typeof found.choices[0].message.parsed.good, "boolean");
});

test("tools, whole and streamed", async () => {
  const found = await client.chat.completions.create(call);
  assert.equal(found.choices[0].finish_reason, "tool_calls");
  const [{ function: asked }] = found.choices[0].message.tool_calls;
  assert.equal(asked.name, "judge");
  assert.ok(["a", "b"].includes(JSON.parse(asked.arguments).grade));
  const streamed = await client.chat.completions.stream(call).finalFunctionToolCall();
  assert.equal(streamed.arguments, asked.arguments);
});

test("tools are run until the model answers", async () => {
  const results = [];
  const runner = client.chat.completions.runTools(
    {
      ...chat, max_completion_tokens: 300, tool_choice: { type: "function", function: { name: "judge" } },
      tools: [{ type: "function", function: {
        name: "judge", parameters: answer, parse: JSON.parse, function: (given) => `grade ${given.grade}`,
      } }],
    },
    { maxChatCompletions: 1 },
  );
  runner.on("functionToolCallResult", (result) => results.push(result));
  await runner.done();
  assert.match(results[0], /^grade [ab]$/);
});

test("completions, embeddings and responses", async () => {
  const text = await client.completions.create({ model: "tiny", prompt: "ab", max_tokens: 2, echo: true });
  assert.ok(text.choices[0].text.startsWith("ab"));
  const vectors = await client.embeddings.create({ model: "tiny", input: ["a", "b"] });
  assert.equal(vectors.data[1].embedding.length, 16);
  const body = { model: "tiny", input: "Hi", max_output_tokens: 6, seed: 1 };
  const response = await client.responses.create(body);
  assert.equal(response.incomplete_details.reason, "max_output_tokens");
  let deltas = "";
  for await (const event of await client.responses.create({ ...body, stream: true })) {
    if (event.type === "response.output_text.delta") deltas += event.delta;
  }
  assert.equal(deltas, response.output_text);
});

test("errors are those of the client", async () => {
  await assert.rejects(client.chat.completions.create({ ...chat, model: "other" }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...chat, colour: 1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "colour");
    assert.equal(error.code, "unknown_parameter");
    return true;
  });
});

test("abort, streamed and not", async () => {
  const long = { ...chat, max_completion_tokens: 900, logit_bias: { 256: -100, 258: -100, 259: -100 } };
  const stream = await client.chat.completions.create({ ...long, stream: true });
  let chunks = 0;
  for await (const _ of stream) if (++chunks === 3) stream.controller.abort();
  assert.ok(chunks < 900);
  const controller = new AbortController();
  setTimeout(() => controller.abort(), 100);
  await assert.rejects(client.chat.completions.create(long, { signal: controller.signal }), OpenAI.APIUserAbortError);
});
