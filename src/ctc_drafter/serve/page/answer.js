// One answer on the page: its text in bursts, its figures, its steps.

import { element } from "./dom.js";

const TINTS = 4;

export class Answer {
  /** look(answer, number): called when the tree of a step is asked for; null where there are no trees. */
  constructor(title, look) {
    this.steps = [];
    this.spans = [];
    this.content = "";
    this.look = look;
    this.text = element("div", { class: "text" });
    this.figures = element("dl", { class: "figures" });
    this.button = element("button", { type: "button", class: "look", hidden: true }, "Look into the steps");
    this.button.addEventListener("click", () => this.look(this, this.firstTree()));
    this.root = element("article", { class: "answer", "aria-busy": "true", "aria-label": title },
      element("h3", {}, title), this.text, this.figures, this.button);
  }

  add(step) {
    const number = this.steps.push(step) - 1;
    const last = step.pieces.length - 1;
    const pieces = step.pieces.map((piece, index) =>
      this.look && step.bonus && index === last ? element("span", { class: "bonus" }, piece.text) : piece.text);
    const span = element("span", this.look ? { class: `burst tint-${number % TINTS}` } : {}, ...pieces);
    if (this.look) span.addEventListener("click", () => this.look(this, number));
    this.spans.push(span);
    this.text.append(span);
    this.content += step.pieces.map((piece) => piece.text).join("");
    this.show(this.live(step));
  }

  live(step) {
    const tokens = this.steps.reduce((sum, each) => sum + each.pieces.length, 0);
    const rounds = this.steps.length - 1;
    return {
      tokens,
      speed: tokens / Math.max(step.seconds, 1e-6),
      beta: rounds ? (tokens - this.steps[0].pieces.length) / rounds : 0,
      nodes: Math.max(step.tree.length - 1, 0),
    };
  }

  end(result) {
    this.text.append(result.tail);
    this.content += result.tail;
    this.speed = result.usage.completion_tokens / Math.max(result.seconds, 1e-6);
    const { nodes } = this.live(this.steps.at(-1));
    this.show({ tokens: result.usage.completion_tokens, speed: this.speed, beta: result.beta, nodes });
    this.done = true;
  }

  settle() {
    this.root.removeAttribute("aria-busy");
    this.button.hidden = !this.look || this.firstTree() < 0;
  }

  show({ tokens, speed, beta, nodes }) {
    const rows = [["tokens/s", speed.toFixed(0)], ["tokens", tokens]];
    if (this.look) rows.push(["β", beta.toFixed(2)], ["tree", `${nodes} nodes`]);
    this.figures.replaceChildren(...rows.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
  }

  firstTree() {
    return this.steps.findIndex((step) => step.tree.length);
  }

  mark(number) {
    this.spans.forEach((span, index) => span.classList.toggle("open", index === number));
    this.spans[number]?.scrollIntoView({ block: "nearest" });
  }
}
