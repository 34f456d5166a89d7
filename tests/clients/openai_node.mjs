// The examples of openai's Node library: parsed outputs, `runTools` and streams.
// https://github.com/openai/openai-node/blob/master/helpers.md
import assert from "node:assert";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0, timeout: 300_000 });
const Step = z.object({ explanation: z.string().max(30), output: z.string().max(30) });
const MathResponse = z.object({ steps: z.array(Step).max(3), final_answer: z.string().max(30) });
const GetWeather = z.object({ city: z.string().max(30), country: z.string().max(30) });
const math = [
  { role: "system", content: "You are a helpful math tutor." },
  { role: "user", content: "solve 8x + 31 = 2" },
];
const weather = [{ role: "user", content: "What is the weather in Paris?" }];
const format = zodResponseFormat(MathResponse, "math_response");

const parsed = await client.chat.completions.parse({
  model: "base", messages: math, response_format: format,
});
assert(parsed.choices[0].message.parsed.final_answer !== undefined);

const called = await client.chat.completions.parse({
  model: "base", messages: weather, tool_choice: "required",
  tools: [zodFunction({ name: "getWeather", parameters: GetWeather })],
});
GetWeather.parse(called.choices[0].message.tool_calls[0].function.parsed_arguments);

const cities = [];
const tool = zodFunction({
  name: "getWeather", description: "Return the weather of a city", parameters: GetWeather,
  function: ({ city }) => { cities.push(city); return { city, degrees: 18 }; },
});
// a forced call is run, and ends the run
const forced = client.chat.completions.runTools({
  model: "base", messages: weather, tools: [tool],
  tool_choice: { type: "function", function: { name: "getWeather" } },
});
assert.match(await forced.finalFunctionToolCallResult(), /degrees/);
assert.equal(cities.length, 1);

// what the model wants, in a stream: noise here
const parts = [];
const plain = {
  type: "function",
  function: {
    name: "getTime", description: "Return the time", parse: JSON.parse, function: () => "noon",
    parameters: { type: "object", properties: { zone: { type: "string" } } },
  },
};
const stream = client.chat.completions
  .runTools({ model: "base", messages: weather, tools: [plain], stream: true, max_tokens: 48 })
  .on("chunk", (chunk) => parts.push(chunk));
assert.equal((await stream.finalMessage()).role, "assistant");
assert(parts.length > 0);

const streamed = client.chat.completions.stream({
  model: "base", messages: math, response_format: format, stream_options: { include_usage: true },
});
const done = await streamed.finalChatCompletion();
assert(done.choices[0].message.parsed.steps !== undefined);
assert(done.usage.completion_tokens > 0);
