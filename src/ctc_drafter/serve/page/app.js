// The page: wires its parts together, and keeps the connection to the server.

import { Chats, Storage } from "./chats.js";
import { byId, button, element } from "./dom.js";
import { History } from "./history.js";
import { Settings } from "./settings.js";
import { about } from "./stream.js";
import { methodTitle, Talk } from "./talk.js";
import { TreePanel } from "./tree.js";

const EXAMPLES = [
  "What are some good ways to relax after a long day at work?",
  "Maya bakes 4 trays of 12 muffins. She sells 30 of them for $2 each. How much money does she make?",
  "Write a Python function that returns the sum of the even numbers in a list.",
];
const RETRY = 3000; // milliseconds

let served = null;
let retry = null;
let connected = null; // a promise

const storage = new Storage();
const settings = new Settings(storage);
const chats = new Chats(storage);
const talk = new Talk({
  settings, chats, notice,
  panel: new TreePanel(),
  served: () => served,
  changed,
  lost: () => connect(),
});
const history = new History(chats, talk, notice);

async function connect() {
  clearTimeout(retry);
  try {
    served = await about(settings.key);
    byId("model").textContent = served.model;
    byId("method").textContent = served.method === null ? "no drafter" : methodTitle(served.method);
    byId("compare").parentNode.hidden = served.method === null;
    talk.offer();
  } catch (error) {
    byId("model").textContent = error.message;
    byId("method").textContent = "";
    if (error.status === 401) byId("settings").open = true;
    else retry = setTimeout(connect, RETRY);
  }
}

/** Tells the reader something, with buttons for what may be done about it. */
function notice(text, ...buttons) {
  byId("notice").replaceChildren(...(text ? [text, ...buttons] : []));
  byId("notice").hidden = !text;
}

async function submit(event) {
  event.preventDefault();
  const prompt = byId("prompt").value.trim();
  if (talk.running || !prompt) return;
  byId("prompt").value = "";
  await connected; // the answer bears the method's name
  await talk.ask(prompt);
}

/** Other chats are kept, or another one is open: the address says which, so that it is there again after a reload. */
function changed() {
  history.show();
  const id = talk.turns.length ? talk.id : "";
  if (globalThis.location?.hash.slice(1) !== id) globalThis.history?.replaceState(null, "", id ? `#${id}` : " ");
}

byId("ask").addEventListener("submit", submit);
// A browser says what is wrong with a field only where it can show it.
byId("settings").addEventListener("invalid", () => { byId("settings").open = true; }, true);
byId("stop").addEventListener("click", () => talk.running?.abort());
byId("fresh").addEventListener("click", () => {
  talk.fresh();
  changed();
});
byId("key").addEventListener("change", () => { connected = connect(); });
byId("talk").addEventListener("scroll", () => talk.offerJump());
byId("jump").addEventListener("click", () => {
  talk.toEnd();
  byId("prompt").focus();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
globalThis.addEventListener?.("pagehide", () => talk.running && talk.keep());
for (const text of EXAMPLES) {
  byId("examples").append(element("li", {}, button(text, () => {
    if (served?.method !== null) byId("compare").checked = true;
    byId("prompt").value = text;
    byId("ask").requestSubmit();
  })));
}
connected = connect();
talk.open(chats.read(globalThis.location?.hash.slice(1) ?? ""));
byId("prompt").focus();
