// Answers questions by the WebAssembly module: node answer.mjs MODULE MODEL QUESTION..
import { readFileSync } from "node:fs";

const [module, model, ...questions] = process.argv.slice(2);
const { instance } = await WebAssembly.instantiate(readFileSync(module), {});
const { memory, reserve, text, open, ask } = instance.exports;
const at = (place, len) => new Uint8Array(memory.buffer, place, len);

/** What a call left as text; an error if it gave a negative length. */
function message(len) {
  const found = new TextDecoder().decode(at(text(), Math.abs(len)));
  if (len < 0) throw new Error(found);
  return found;
}

const image = readFileSync(model);
const place = reserve(image.length);
if (place === 0) throw new Error(`no memory for ${image.length} bytes`);
at(place, image.length).set(image);
message(open());
for (const question of questions) {
  const bytes = new TextEncoder().encode(question);
  if (bytes.length > 4096) throw new Error(`a question of ${bytes.length} bytes exceeds 4096`);
  at(text(), bytes.length).set(bytes);
  console.log(message(ask(bytes.length)));
}
