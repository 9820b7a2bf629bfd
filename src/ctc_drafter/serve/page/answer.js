// One answer on the page: its text in bursts, its figures, its steps.

import { element } from "./dom.js";

const TINTS = 4;

export class Answer {
  /** look(answer, number): called when the tree of a step is asked for; null where there are no trees. */
  constructor(title, look) {
    this.steps = [];
    this.spans = [];
    this.done = false;
    this.content = "";
    this.look = look;
    this.text = element("div", { class: "text" });
    this.figures = element("dl", { class: "figures" });
    this.state = element("p", { class: "quiet" }, "Waits for its turn.");
    this.button = element("button", { type: "button", class: "look", hidden: true }, "Look into the steps");
    this.button.addEventListener("click", () => this.look(this, this.firstTree()));
    this.root = element("article", { class: "answer", "aria-label": title },
      element("h2", {}, title), this.state, this.text, this.figures, this.button);
  }

  begin() {
    this.root.setAttribute("aria-busy", "true");
    this.state.hidden = true;
  }

  add(step) {
    const number = this.steps.push(step) - 1;
    const last = step.pieces.length - 1;
    const pieces = step.pieces.flatMap((piece, index) =>
      this.look && step.bonus && index === last ? underlined(piece.text) : [piece.text]);
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
    this.settle();
  }

  /** why: shown where the answer did not come to its end. */
  settle(why = "") {
    this.root.removeAttribute("aria-busy");
    this.state.hidden = this.done;
    this.state.textContent = why;
    this.button.hidden = !this.look || this.firstTree() < 0;
  }

  show({ tokens, speed, beta, nodes }) {
    const rows = [["tokens/s", speed.toFixed(0)], ["tokens", tokens]];
    if (this.look) rows.push(["tokens per pass, β", beta.toFixed(2)], ["last tree", `${nodes} ${nodes === 1 ? "node" : "nodes"}`]);
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

/** The model's own token; a space before it stays plain, a line end shows nothing. */
function underlined(text) {
  const [, space, rest] = text.match(/^(\s*)(.*)$/s);
  return rest ? [space, element("span", { class: "bonus" }, rest)] : [element("span", { class: "bonus" }, space)];
}
