// node openai.mjs URL: calls of OpenAI's JavaScript SDK.

import OpenAI from "openai";

import { ASKED, EMBED, MODEL, SCHEMA, TOOL, TOOLED } from "./asked.mjs";
import { finish, tell } from "./told.mjs";

const client = new OpenAI({
  baseURL: `${process.argv[2]}/v1`,
  apiKey: "unused",
  maxRetries: 0,
});
const chat = { model: MODEL, messages: ASKED };
const create = (fields) => client.chat.completions.create({ ...chat, ...fields });

await tell("chat", () => create({}));
await tell("chat stream", () => create({ stream: true }));
await tell("chat stream usage", () =>
  create({ stream: true, stream_options: { include_usage: true } }),
);
await tell("chat tools", () => create({ messages: TOOLED, tools: [TOOL] }));
await tell("chat tools stream", () => create({ messages: TOOLED, tools: [TOOL], stream: true }));
await tell("chat schema", () =>
  create({
    response_format: { type: "json_schema", json_schema: { name: "answer", schema: SCHEMA } },
  }),
);
await tell("completions", () => client.completions.create({ model: MODEL, prompt: "Why?" }));
await tell("responses", () => client.responses.create({ model: MODEL, input: "Why?" }));
await tell("responses stream", () =>
  client.responses.create({ model: MODEL, input: "Why?", stream: true }),
);
await tell("embeddings", () =>
  client.embeddings.create({ model: EMBED, input: ["sky", "sea"] }),
);
await tell("embeddings floats", () =>
  client.embeddings.create({ model: EMBED, input: "sky", encoding_format: "float" }),
);
await tell("models", () => client.models.list());
await tell("model", () => client.models.retrieve(MODEL));
await tell("chat missing", () => create({ model: "none" }));
await tell("chat missing stream", () => create({ model: "none", stream: true }));
await tell("chat empty", () => create({ messages: [] }));
await tell("model missing", () => client.models.retrieve("none:latest"));
finish();
