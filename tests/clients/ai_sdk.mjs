// The examples of Vercel's AI SDK with its provider for compatible endpoints: tools in steps, objects, streams.
// https://ai-sdk.dev/docs/ai-sdk-core/tools-and-tool-calling
import assert from "node:assert";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "rankloom", baseURL: process.argv[2], apiKey: "none", supportsStructuredOutputs: true, includeUsage: true,
});
const model = provider("base");
const Recipe = z.object({
  name: z.string().max(40),
  ingredients: z.array(z.object({ name: z.string().max(20), amount: z.string().max(10) })).max(3),
});
const weather = tool({
  description: "Get the weather in a location",
  inputSchema: z.object({ location: z.string().max(30).describe("The location to get the weather for") }),
  execute: async ({ location }) => ({ location, temperature: 72 }),
});
const common = { model, maxRetries: 0 };

const asked = { ...common, tools: { weather }, prompt: "What is the weather in San Francisco?" };
const steps = await generateText({
  ...asked, maxOutputTokens: 500, stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
});
assert.equal(steps.steps.length, 2);
assert.equal(steps.steps[0].toolResults[0].output.temperature, 72);
assert(steps.steps[1].finishReason !== "tool-calls");

const named = streamText({ ...asked, toolChoice: { type: "tool", toolName: "weather" } });
const kinds = new Set();
for await (const part of named.fullStream) {
  kinds.add(part.type);
  if (part.type === "error") throw part.error;
}
for (const kind of ["tool-input-start", "tool-input-delta", "tool-call", "tool-result"]) assert(kinds.has(kind), kind);
assert((await named.usage).outputTokens > 0);

const recipe = await generateText({
  ...common, output: Output.object({ schema: Recipe }), prompt: "Generate a lasagna recipe.",
});
Recipe.parse(recipe.output);

const partial = streamText({
  ...common, output: Output.object({ schema: Recipe }), prompt: "Generate a lasagna recipe.",
});
let last;
for await (const part of partial.partialOutputStream) last = part;
Recipe.parse(last);

const choice = await generateText({
  ...common, output: Output.choice({ options: ["sunny", "rainy"] }), prompt: "Classify: the sun shines.",
});
assert(["sunny", "rainy"].includes(choice.output));
