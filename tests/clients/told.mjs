// Writes down what a client was told: one entry per call, as JSON on the last line of the output.

const entries = [];

// `call` returns an answer, or something that yields records; `seen` is told of each with their
// number so far, and may abort.
export async function tell(name, call, seen = () => {}) {
  const records = [];
  let failure = null;
  try {
    const answer = await call();
    if (answer?.[Symbol.asyncIterator] === undefined) {
      records.push(answer);
    } else {
      for await (const record of answer) {
        records.push(record);
        seen(answer, records.length);
      }
    }
  } catch (error) {
    const status = error.status_code ?? error.status ?? null;
    failure = { raised: error.constructor.name, status, text: error.message };
  }
  entries.push([name, records, failure]);
}

export function finish() {
  process.stdout.write(`\n${JSON.stringify(entries)}\n`);
}
