// node aborting.mjs URL: streams that their clients abort after the third record.

import { Ollama } from "ollama";
import OpenAI from "openai";

import { ASKED, MODEL } from "./asked.mjs";
import { finish, tell } from "./told.mjs";

const fields = { model: MODEL, messages: ASKED, stream: true };
const ollama = new Ollama({ host: process.argv[2] });
const openai = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "unused", maxRetries: 0 });

await tell(
  "ollama",
  () => ollama.chat(fields),
  (stream, records) => records === 3 && stream.abort(),
);
await tell(
  "openai",
  () => openai.chat.completions.create(fields),
  (stream, records) => records === 3 && stream.controller.abort(),
);
finish();
