// node ollama.mjs URL: calls of Ollama's JavaScript client.

import { Ollama } from "ollama";

import { ASKED, EMBED, IMAGE, MODEL, SCHEMA, TOOL, TOOLED } from "./asked.mjs";
import { finish, tell } from "./told.mjs";

const client = new Ollama({ host: process.argv[2] });
const chat = { model: MODEL, messages: ASKED };

await tell("chat", () => client.chat({ ...chat }));
await tell("chat stream", () => client.chat({ ...chat, stream: true }));
await tell("chat think", () => client.chat({ ...chat, think: true, stream: true }));
await tell("chat tools", () => client.chat({ ...chat, messages: TOOLED, tools: [TOOL] }));
await tell("chat tools stream", () =>
  client.chat({ ...chat, messages: TOOLED, tools: [TOOL], stream: true }),
);
await tell("chat format", () => client.chat({ ...chat, format: SCHEMA }));
await tell("chat image", () =>
  client.chat({ ...chat, messages: [{ role: "user", content: "What?", images: [IMAGE] }] }),
);
await tell("generate", () => client.generate({ model: MODEL, prompt: "Why?" }));
await tell("generate stream", () =>
  client.generate({ model: MODEL, prompt: "Why?", stream: true }),
);
await tell("embed", () => client.embed({ model: EMBED, input: ["sky", "sea"] }));
await tell("embeddings", () => client.embeddings({ model: EMBED, prompt: "sky" }));
await tell("list", () => client.list());
await tell("ps", () => client.ps());
await tell("show", () => client.show({ model: MODEL }));
await tell("version", () => client.version());
await tell("chat missing", () => client.chat({ ...chat, model: "none" }));
await tell("chat missing stream", () => client.chat({ ...chat, model: "none", stream: true }));
await tell("chat nameless", () => client.chat({ ...chat, model: "" }));
await tell("generate nameless", () => client.generate({ model: "", prompt: "Why?" }));
await tell("show missing", () => client.show({ model: "none" }));

await tell("pull", () => client.pull({ model: "qwen2.5:0.5b" }));
await tell("pull stream", () => client.pull({ model: "llama3.2:3b", stream: true }));
await tell("pull missing", () => client.pull({ model: "none" }));
await tell("pull missing stream", () => client.pull({ model: "none", stream: true }));
await tell("copy", () => client.copy({ source: MODEL, destination: "mine" }));
await tell("create", () => client.create({ model: "poet", from: MODEL, system: "Rhyme." }));
await tell("create stream", () =>
  client.create({ model: "bard", from: MODEL, system: "Rhyme.", stream: true }),
);
await tell("chat poet", () => client.chat({ ...chat, model: "poet" }));
await tell("delete", () => client.delete({ model: "mine" }));
await tell("delete missing", () => client.delete({ model: "mine" }));
await tell("list changed", () => client.list());
finish();
