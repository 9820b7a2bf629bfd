// The page: a conversation, each answer with the drafter, and by plain decoding after it if that is asked for.

import { byId, element } from "./dom.js";
import { modelName, ServerError, stream } from "./stream.js";
import { TreePanel } from "./tree.js";
import { Turn } from "./turn.js";

const EXAMPLES = [
  "What are some good ways to relax after a long day at work?",
  "Maya bakes 4 trays of 12 muffins. She sells 30 of them for $2 each. How much money does she make?",
  "Write a Python function that returns the sum of the even numbers in a list.",
];
const RETRY = 3000; // milliseconds

const panel = new TreePanel();
const messages = [];
let running = null;
let retry = null;

async function connect() {
  clearTimeout(retry);
  try {
    byId("model").textContent = await modelName(byId("key").value);
  } catch (error) {
    byId("model").textContent = error.message;
    if (error.status === 401) byId("settings").open = true;
    else retry = setTimeout(connect, RETRY);
  }
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

/** A hidden button would lose the focus. */
function busy(controller) {
  const focused = document.activeElement;
  running = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  if (controller && focused === byId("send")) byId("stop").focus();
  if (!controller && (focused === byId("stop") || focused === document.body)) byId("prompt").focus();
}

async function submit(event) {
  event.preventDefault();
  const prompt = byId("prompt").value.trim();
  if (running || !prompt) return;
  notice("");
  byId("welcome").hidden = true;
  byId("prompt").value = "";
  const controller = new AbortController();
  const turn = new Turn(prompt, byId("compare").checked, (answer, number) => panel.open(answer, number));
  byId("turns").append(turn.root);
  turn.root.scrollIntoView({ block: "nearest" });
  busy(controller);
  try {
    await run(turn, controller.signal);
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof ServerError)) throw error;
    if (error instanceof ServerError) {
      notice(error.message);
      connect();
    }
  } finally {
    finish(turn, controller.signal.aborted);
    busy(null);
  }
}

/** What was answered, or stopped on purpose, is history; what failed is the question's writer's again. */
function finish(turn, stopped) {
  turn.settle(stopped ? "Stopped." : "Cut off.");
  if (!turn.root.isConnected) return; // a new chat has begun
  const { content, done } = turn.drafted;
  if (done || (stopped && content)) {
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content });
    return;
  }
  if (!byId("prompt").value) byId("prompt").value = turn.question;
  if (content) return;
  turn.root.remove();
  byId("welcome").hidden = byId("turns").children.length > 0;
}

/** The drafter's answer, then plain decoding's: one after the other, so that the speeds can be compared. */
async function run(turn, signal) {
  const request = {
    messages: [...messages, { role: "user", content: turn.question }],
    temperature: byId("temperature").valueAsNumber || 0,
    max_tokens: byId("tokens").valueAsNumber || 128,
    seed: Math.floor(Math.random() * 2 ** 31),
  };
  byId("status").textContent = "The answer is being written.";
  await fill(turn.drafted, request, signal);
  byId("status").textContent = `Answer: ${turn.drafted.content}`;
  if (!turn.plain) return;
  await fill(turn.plain, { ...request, plain: true }, signal);
  following(() => { byId("status").textContent = turn.judge(); });
}

async function fill(answer, request, signal) {
  answer.begin();
  await stream(request, byId("key").value, signal, (name, data) => following(() => {
    if (name === "step") {
      answer.add(data);
      panel.grew(answer);
    } else if (name === "end") answer.end(data);
    else throw new ServerError(data.error.message);
  }));
  if (!answer.done) throw new ServerError("The server stopped in the middle of the answer.");
}

/** Stays at the end of the conversation, if that is where the reader is. */
function following(change) {
  const talk = byId("talk");
  const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  change();
  if (follows) talk.scrollTop = talk.scrollHeight;
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
// A browser says what is wrong with a field only where it can show it.
byId("settings").addEventListener("invalid", () => { byId("settings").open = true; }, true);
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
