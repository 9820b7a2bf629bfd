// Runs the page's scripts in Node.js on a stand-in for the document, against a server: node page_driver.mjs URL KEY PAGE
// It shows that the scripts work together; how they look and feel is for the tests in Chromium.
import { readFileSync } from "node:fs";

const [url, key, page] = process.argv.slice(2);

class Stub {
  constructor(tag) {
    Object.assign(this, { tag, children: [], listeners: {}, attributes: {}, hidden: false, value: "", checked: false });
    Object.assign(this, { scrollHeight: 0, scrollTop: 0, clientHeight: 0, parent: null });
    const classes = () => new Set((this.attributes.class ?? "").split(" ").filter(Boolean));
    const change = (apply) => { const all = classes(); apply(all); this.attributes.class = [...all].join(" "); };
    this.dataset = {};
    this.classList = {
      add: (name) => change((all) => all.add(name)),
      toggle: (name, on) => change((all) => (on ? all.add(name) : all.delete(name))),
    };
  }
  get valueAsNumber() { return Number(this.value); }
  get textContent() { return this.children.map((child) => child.textContent ?? child).join(""); }
  set textContent(text) { this.children = [text]; }
  setAttribute(name, value) { if (name === "hidden") this.hidden = true; else this.attributes[name] = String(value); }
  removeAttribute(name) { delete this.attributes[name]; }
  prepend(...children) { const rest = this.children; this.children = []; this.append(...children, ...rest); }
  get parentNode() { return this.parent ?? new Stub("div"); }
  append(...children) { for (const child of children) { this.children.push(child); if (child instanceof Stub) child.parent = this; } }
  replaceChildren(...children) { this.children = []; this.append(...children); }
  after(child) { this.parent?.append(child); }
  remove() { this.parent.children = this.parent.children.filter((child) => child !== this); this.parent = null; }
  get isConnected() { return Object.values(named).includes(this) || Boolean(this.parent?.isConnected); }
  addEventListener(name, listener) { (this.listeners[name] ??= []).push(listener); }
  send(name, event = {}) { return Promise.all((this.listeners[name] ?? []).map((call) => call({ preventDefault() {}, ...event }))); }
  requestSubmit() { this.submitted = this.send("submit"); }
  focus() { document.activeElement = this; }
  scrollIntoView() {}
  *all() { for (const child of this.children) if (child instanceof Stub) { yield child; yield* child.all(); } }
  find(name) { return [...this.all()].filter((each) => (each.attributes.class ?? "").split(" ").includes(name)); }
}

const named = {};
for (const [, tag, rest] of readFileSync(`${page}/index.html`, "utf-8").matchAll(/<(\w+)([^>]* id="[^>]*)>/g)) {
  const made = new Stub(tag);
  made.hidden = / hidden/.test(rest);
  made.value = rest.match(/ value="([^"]*)"/)?.[1] ?? "";
  named[rest.match(/ id="([^"]*)"/)[1]] = made;
}
globalThis.document = { createElement: (tag) => new Stub(tag), getElementById: (id) => named[id], activeElement: null };
document.body = new Stub("body");
const ask = globalThis.fetch;
globalThis.fetch = (path, options) => ask(url + path, options);

named.key.value = key;
await import(`${page}/app.js`);
const send = async (text) => {
  named.prompt.value = text;
  named.ask.requestSubmit();
  await named.ask.submitted;
};

named.compare.checked = true;
named.tokens.value = "32";
await send("the cat sat?");
const [turn] = named.turns.children;
const result = {
  texts: turn.find("text").map((each) => each.textContent),
  bursts: turn.find("burst").length,
  bonus: turn.find("bonus").length,
  verdict: turn.find("verdict").map((each) => each.textContent),
  title: turn.find("answer").map((each) => each.attributes["aria-label"]),
  figures: turn.find("figures").map((each) => each.textContent),
  model: named.model.textContent,
};

await turn.find("look")[0].send("click");
result.tree = [];
for (let step = 0; step < 3; step++) {
  result.tree.push([named["tree-title"].textContent, named["tree-summary"].textContent, named["tree-body"].textContent]);
  await named.tree.send("keydown", { key: "ArrowRight" });
}
result.nodes = named["tree-body"].find("node").length;
await named.tree.send("keydown", { key: "Escape" });
result.closed = named.tree.hidden;

globalThis.fetch = () => Promise.reject(new TypeError("gone"));
await send("and the hat?");
result.notice = [named.notice.hidden, named.notice.textContent, named.prompt.value];
globalThis.fetch = (path, options) => ask(url + path, options);
named.compare.checked = false;
await send(named.prompt.value);
result.again = [named.notice.hidden, named.turns.children.at(-1).find("text").length];
console.log(JSON.stringify(result));
process.exit(0);
