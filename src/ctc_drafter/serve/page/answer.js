// One answer on the page: its text in bursts and formatted, its figures, its steps.

import { button, copyButton, element } from "./dom.js";
import { rendered } from "./markdown.js";

const TINTS = 4;

export class Answer {
  /**
   * look(answer, number): called when the tree of a step is asked for; null where there are no trees.
   * settings.view: "text" or "bursts", what a finished answer shows; the choice made last holds for the next one.
   */
  constructor(title, look, settings) {
    Object.assign(this, { title, look, settings, steps: [], spans: [], nodes: [], tail: "", finish: "", why: "", running: null });
    Object.assign(this, { beside: null, follows: false, hasText: false });
    Object.assign(this, { tokens: 0, verifications: 0, drafted: 0, seconds: 0 }); // of the parts that ended
    this.text = element("div", { class: "text" });
    this.formatted = element("div", { class: "formatted", hidden: true });
    this.figures = element("dl", { class: "figures" });
    this.state = element("p", { class: "state quiet" }, "Waits for its turn.");
    this.view = button("", () => this.turnOver(), { class: "small view", hidden: true });
    this.button = button("Look into the steps", () => this.look(this, this.firstTree()), { class: "small look", hidden: true });
    this.copy = copyButton(() => this.content, "Copy", { class: "small copy", "aria-label": `Copy the answer of ${title}`, hidden: true });
    this.tools = element("div", { class: "tools" }, this.copy, ...(look ? [this.view, this.button] : []));
    this.root = element("article", { class: "answer", "aria-label": title },
      element("div", { class: "head" }, element("h2", {}, title), this.figures),
      this.text, this.formatted, this.state, this.tools);
  }

  get content() {
    return this.steps.flatMap((step) => step.pieces).map((piece) => piece.text).join("") + this.tail;
  }

  get ids() {
    return this.steps.flatMap((step) => step.pieces).map((piece) => piece.token);
  }

  /** Whether it came to an end of its own, or to that of its tokens. */
  get done() {
    return Boolean(this.finish);
  }

  get speed() {
    return speed(this);
  }

  /** The answer is being written, for the first time or further. */
  begin() {
    this.text.replaceChildren(...this.nodes);
    this.finish = this.tail = this.why = "";
    this.root.setAttribute("aria-busy", "true");
    for (const each of [this.state, this.formatted, this.view, this.copy]) each.hidden = true;
    this.text.hidden = false;
  }

  add(step) {
    this.burst(step);
    this.running = this.part();
    this.show(this.running);
  }

  /** The figures with those of the part that is being written. */
  part() {
    const steps = this.steps.slice(this.steps.findLastIndex((each) => !each.number));
    const count = (some) => some.reduce((sum, each) => sum + each.pieces.length, 0);
    return {
      tokens: this.tokens + count(steps),
      verifications: this.verifications + steps.length - 1,
      drafted: this.drafted + count(steps.slice(1)),
      seconds: this.seconds + steps.at(-1).seconds,
    };
  }

  burst(step) {
    const number = this.steps.push(step) - 1;
    const last = step.pieces.length - 1;
    const [space, texts] = apart(step.pieces.map((piece) => piece.text));
    const pieces = texts.flatMap((text, index) => (this.look && step.bonus && index === last ? own(text) : [text]));
    const blank = step.pieces.every((piece) => !piece.text.trim()); // a tint on spaces looks like dirt
    const span = element("span", this.look ? { class: `burst ${blank ? "blank" : `tint-${number % TINTS}`}` } : {}, ...pieces);
    if (this.look) span.addEventListener("click", () => this.look(this, number));
    this.spans.push(span);
    this.nodes.push(space, span);
    this.text.append(space, span);
  }

  end(result) {
    this.text.append(result.tail);
    this.tail = result.tail;
    this.finish = result.finish_reason;
    this.tokens += result.usage.completion_tokens;
    this.verifications += result.verifications;
    this.drafted += result.usage.completion_tokens - 1;
    this.seconds += result.seconds;
    this.running = null;
    this.show(this);
  }

  /** why: shown where the answer did not come to its end. */
  settle(why = "") {
    this.root.removeAttribute("aria-busy");
    Object.assign(this, this.running ?? {}, { running: null });
    this.why = this.done ? "" : why;
    const cut = this.finish === "length" ? `Cut at ${this.ids.length} tokens.` : this.why;
    this.state.hidden = !cut;
    this.state.replaceChildren(cut);
    this.copy.hidden = !this.content;
    this.button.hidden = !this.look || this.firstTree() < 0;
    this.text.classList.toggle("with-code", /^ *(```|~~~)/m.test(this.content));
    const nodes = this.done ? rendered(this.content) : null;
    this.formatted.replaceChildren(...(nodes ? [nodes] : []));
    this.view.hidden = !nodes;
    this.hasText = Boolean(nodes);
    this.showAs(this.look || this.follows ? this.settings.view : "text");
  }

  /** The answer beside it goes along, so that they can be compared. */
  showAs(view) {
    const formatted = view === "text" && this.hasText;
    this.formatted.hidden = !formatted;
    this.text.hidden = formatted;
    this.view.textContent = formatted ? "Show bursts" : "Show text";
    this.beside?.showAs(view);
  }

  turnOver() {
    this.settings.view = this.text.hidden ? "bursts" : "text";
    this.showAs(this.settings.view);
  }

  /** The first token of every part is the prompt's pass's, and no step's. */
  show({ tokens, seconds, drafted, verifications }) {
    const perStep = verifications ? drafted / verifications : 0;
    const steps = this.look ? [["tokens per step", perStep.toFixed(1)]] : [];
    const perSecond = speed({ tokens, seconds });
    const rows = [["tokens/s", perSecond.toFixed(perSecond < 10 ? 1 : 0)], ...steps, ["tokens", tokens]];
    this.figures.replaceChildren(...rows.map(([name, value]) =>
      element("div", {}, element("dd", {}, String(value)), element("dt", {}, name))));
  }

  /** -1 where no trees are there: in an answer without a drafter, and in one that was kept. */
  firstTree() {
    return this.steps.findIndex((step) => step.tree?.length);
  }

  mark(number) {
    if (number >= 0) this.showAs("bursts");
    this.spans.forEach((span, index) => span.classList.toggle("open", index === number));
    this.spans[number]?.scrollIntoView({ block: "nearest" });
  }

  /** What is kept in the browser: everything but the trees, which would fill it. */
  packed() {
    const { title, tail, finish, why } = this;
    const { tokens, verifications, drafted, seconds } = this.running ?? this;
    const steps = this.steps.map((step) =>
      [step.number ? 1 : 0, step.bonus ? 1 : 0, step.pieces.flatMap((piece) => [piece.token, piece.text])]);
    return { title, tail, finish, why, tokens, verifications, drafted, seconds, drafts: Boolean(this.look), steps };
  }

  static unpacked(kept, look, settings) {
    const { title, steps, drafts, why, ...rest } = kept;
    const made = new Answer(title, drafts ? look : null, settings);
    for (const [number, bonus, flat] of steps) {
      const pieces = flat.flatMap((token, at) => (at % 2 ? [] : [{ token, text: flat[at + 1] }]));
      made.burst({ number, bonus: Boolean(bonus), pieces, tree: null });
    }
    Object.assign(made, rest);
    made.text.append(made.tail);
    if (made.tokens) made.show(made);
    made.settle(why || "Cut off: the page was left.");
    return made;
  }
}

const speed = ({ tokens, seconds }) => tokens / Math.max(seconds, 1e-6);

/** The space that texts begin with, and them without it: a tint on it would stand at the end of the line before. */
function apart(texts) {
  const space = texts.join("").match(/^\s*/)[0];
  let rest = space.length;
  return [space, texts.map((text) => {
    const cut = Math.min(rest, text.length);
    rest -= cut;
    return text.slice(cut);
  })];
}

/** The model's own token, underlined under the pointer; a space before it stays plain, a line end shows nothing. */
function own(text) {
  const [, space, rest] = text.match(/^(\s*)(.*)$/s);
  return rest ? [space, element("span", { class: "bonus" }, rest)] : [element("span", { class: "bonus" }, space)];
}
