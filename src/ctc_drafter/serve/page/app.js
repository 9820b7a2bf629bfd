// The page: a conversation, each answer with the drafter, and by plain decoding after it if that is asked for.

import { Answer } from "./answer.js";
import { byId, element } from "./dom.js";
import { modelName, ServerError, stream } from "./stream.js";
import { TreePanel } from "./tree.js";

const EXAMPLES = [
  "What are some good ways to relax after a long day at work?",
  "Maya bakes 4 trays of 12 muffins. She sells 30 of them for $2 each. How much money does she make?",
  "Write a Python function that returns the sum of the even numbers in a list.",
];
const RETRY = 3000; // milliseconds

const panel = new TreePanel();
const messages = [];
let running = null;

async function connect() {
  try {
    byId("model").textContent = await modelName(byId("key").value);
  } catch (error) {
    byId("model").textContent = error.message;
    setTimeout(connect, RETRY);
  }
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function busy(controller) {
  running = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
}

async function submit(event) {
  event.preventDefault();
  const prompt = byId("prompt").value.trim();
  if (running || !prompt) return;
  notice("");
  byId("welcome").hidden = true;
  const answers = element("div", { class: "answers" });
  const turn = element("li", {}, element("p", { class: "question" }, prompt), answers);
  byId("turns").append(turn);
  byId("prompt").value = "";
  const controller = new AbortController();
  busy(controller);
  const compare = byId("compare").checked;
  try {
    const drafted = await run([...messages, { role: "user", content: prompt }], answers, compare, controller.signal);
    messages.push({ role: "user", content: prompt }, { role: "assistant", content: drafted.content });
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof ServerError)) throw error;
    if (error instanceof ServerError) {
      notice(error.message);
      if (!byId("prompt").value) byId("prompt").value = prompt;
      connect();
    }
    turn.classList.add("cut");
  } finally {
    busy(null);
    byId("prompt").focus();
  }
}

/** The drafter's answer, then plain decoding's: one after the other, so that the speeds can be compared. */
async function run(conversation, place, compare, signal) {
  const request = {
    messages: conversation,
    temperature: byId("temperature").valueAsNumber || 0,
    max_tokens: byId("tokens").valueAsNumber || 128,
    seed: Math.floor(Math.random() * 2 ** 31),
  };
  const drafted = new Answer("CTC drafter", (answer, number) => panel.open(answer, number));
  const plain = compare ? new Answer("Plain decoding", null) : null;
  place.append(drafted.root, ...(plain ? [plain.root] : []));
  place.scrollIntoView({ block: "nearest" });
  await fill(drafted, request, signal);
  byId("status").textContent = `Answer: ${drafted.content}`;
  if (plain) {
    await fill(plain, { ...request, plain: true }, signal);
    place.after(verdict(drafted, plain));
  }
  return drafted;
}

async function fill(answer, request, signal) {
  const talk = byId("talk");
  try {
    await stream(request, byId("key").value, signal, (name, data) => {
      const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
      if (name === "step") answer.add(data);
      else if (name === "end") answer.end(data);
      else throw new ServerError(data.error.message);
      if (follows) talk.scrollTop = talk.scrollHeight;
    });
    if (!answer.done) throw new ServerError("The server stopped in the middle of the answer.");
  } finally {
    answer.settle();
  }
}

function verdict(drafted, plain) {
  const same = drafted.content === plain.content;
  const text = `${(drafted.speed / plain.speed).toFixed(2)} times as fast; ${same ? "the same text" : "the texts differ"}.`;
  byId("status").textContent = text;
  return element("p", { class: `verdict ${same ? "same" : "differs"}` }, text);
}

function fresh() {
  running?.abort();
  messages.length = 0;
  if (!byId("tree").hidden) panel.close();
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  notice("");
  byId("prompt").focus();
}

byId("ask").addEventListener("submit", submit);
byId("stop").addEventListener("click", () => running?.abort());
byId("fresh").addEventListener("click", fresh);
byId("key").addEventListener("change", connect);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
for (const text of EXAMPLES) {
  const button = element("button", { type: "button" }, text);
  button.addEventListener("click", () => {
    byId("prompt").value = text;
    byId("ask").requestSubmit();
  });
  byId("examples").append(element("li", {}, button));
}
connect();
byId("prompt").focus();
