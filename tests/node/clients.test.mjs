// The Node SDK and the AI SDK against a running server; tests/clients/client_node.py starts it and says where it is.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, Output, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = process.env.LMX_URL;
const model = process.env.LMX_MODEL;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const provider = createOpenAICompatible({ name: "lmx", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const City = z.object({ name: z.string(), inhabitants: z.number().int().min(0), tags: z.array(z.string()).max(2) });
const ask = [{ role: "user", content: "Tell me of Paris." }];

test("parse with zod", async () => {
  const done = await client.chat.completions.parse({
    model, messages: ask, max_tokens: 300, response_format: zodResponseFormat(City, "city"),
  });
  City.parse(done.choices[0].message.parsed);
});

test("a stream put together is the answer", async () => {
  const fixed = { model, messages: ask, max_tokens: 40, seed: 7 };
  const whole = await client.chat.completions.create(fixed);
  const stream = client.chat.completions.stream(fixed);
  assert.equal(await stream.finalContent(), whole.choices[0].message.content);
});

test("runTools calls what the model asks for", async () => {
  let called = 0;
  const runner = client.chat.completions.runTools({
    model,
    messages: [{ role: "user", content: "Weather in Rome?" }],
    max_tokens: 200,
    tool_choice: { type: "function", function: { name: "get_weather" } },
    tools: [{
      type: "function",
      function: {
        name: "get_weather",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
        parse: JSON.parse,
        function: ({ city }) => { called += 1; assert.equal(typeof city, "string"); return "sunny"; },
      },
    }],
  });
  await runner.done();
  assert.equal(called, 1);
});

test("embeddings, which the SDK asks for in base64", async () => {
  const input = ["a cat", "a kitten", "the stock market"];
  const sent = await client.embeddings.create({ model: "all-MiniLM-L6-v2", input });
  const plain = await client.embeddings.create({ model: "all-MiniLM-L6-v2", input, encoding_format: "float" });
  assert.equal(sent.data.length, 3);
  sent.data.forEach((item, row) => item.embedding.forEach((value, column) =>
    assert.ok(Math.abs(value - plain.data[row].embedding[column]) < 1e-6)));
});

test("AI SDK: text, object, tools, embeddings", async () => {
  const text = await generateText({ model: provider(model), prompt: "Say hello.", maxOutputTokens: 20 });
  assert.ok(text.text.length > 0);
  const { output } = await generateText({
    model: provider(model), prompt: "Tell me of Paris.", maxOutputTokens: 300, output: Output.object({ schema: City }),
  });
  City.parse(output);
  const weather = tool({ description: "The weather", inputSchema: z.object({ city: z.string() }) });
  const streamed = streamText({
    model: provider(model), prompt: "Weather in Rome?", maxOutputTokens: 200, tools: { weather }, toolChoice: "required",
  });
  await streamed.consumeStream();
  const calls = await streamed.toolCalls;
  assert.equal(calls[0].toolName, "weather");
  assert.equal(typeof calls[0].input.city, "string");
  const { embeddings } = await embedMany({
    model: provider.textEmbeddingModel("all-MiniLM-L6-v2"), values: ["a", "b"],
  });
  assert.equal(embeddings[0].length, 384);
});

test("AI SDK without supportsStructuredOutputs says nothing about JSON, and it ends", async () => {
  const plain = createOpenAICompatible({ name: "lmx", baseURL, apiKey: "none" });
  const result = await generateText({
    model: plain(model), prompt: "What is the capital of Japan?", maxOutputTokens: 500, temperature: 0, output: Output.json(),
  });
  assert.equal(result.finishReason, "stop");
  assert.equal(typeof JSON.parse(result.text), "object");
});
