// The panel that shows the tree of one step.

import { byId, element, visible } from "./dom.js";

export class TreePanel {
  constructor() {
    this.answer = null;
    this.number = 0;
    byId("previous").addEventListener("click", () => this.move(-1));
    byId("next").addEventListener("click", () => this.move(1));
    byId("close-tree").addEventListener("click", () => this.close());
    byId("tree").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
      else if (event.key === "ArrowLeft") this.move(-1);
      else if (event.key === "ArrowRight") this.move(1);
      else return;
      event.preventDefault();
    });
  }

  open(answer, number) {
    if (this.answer !== answer) this.answer?.mark(-1);
    const wasOpen = !byId("tree").hidden;
    this.answer = answer;
    byId("tree").hidden = false;
    this.show(number);
    if (!wasOpen) byId("tree-title").focus();
  }

  close() {
    byId("tree").hidden = true;
    this.answer?.mark(-1);
    // While the answer is being written its button is hidden and cannot take the focus.
    const back = this.answer && !this.answer.button.hidden ? this.answer.button : byId("prompt");
    back.focus();
    this.answer = null;
  }

  /** There is one more step of this answer. */
  grew(answer) {
    if (answer === this.answer) this.count();
  }

  move(by) {
    const number = this.number + by;
    if (this.answer && number >= 0 && number < this.answer.steps.length) this.show(number);
  }

  show(number) {
    this.number = number;
    const step = this.answer.steps[number];
    this.count();
    byId("tree-summary").textContent = summary(step);
    byId("tree-body").replaceChildren(...(step.tree?.length ? [list(step, 0)] : []));
    this.answer.mark(number);
  }

  count() {
    const last = this.answer.steps.length - 1;
    byId("tree-title").textContent = `Step ${this.number} of ${last}`;
    // Not `disabled`: the button would lose the focus, and the arrow keys with it.
    byId("previous").setAttribute("aria-disabled", this.number === 0);
    byId("next").setAttribute("aria-disabled", this.number === last);
  }
}

function summary(step) {
  if (!step.tree) return "Trees are not kept when the page is left; those of new answers are here again.";
  if (!step.tree.length) return "The prompt was read; the model wrote the first token itself.";
  const count = step.tree.length - 1;
  const drafted = count ? `${count} ${count === 1 ? "token" : "tokens"} drafted and checked in one step` : "Nothing was likely enough to draft";
  const bonus = step.bonus ? `; “${visible(step.pieces.at(-1).text)}” added by the model` : "; the answer ends here";
  return `${drafted}, ${step.accepted} accepted${bonus}.`;
}

/** These nodes with all below them, as nested lists; the model's own token where it left the tree. */
function list(step, ...numbers) {
  return element("ul", { role: "list" }, ...numbers.map((number) => {
    const children = step.tree.flatMap((node, index) => (index && node.parent === number ? [index] : []));
    const item = element("li", {}, number ? label(step.tree[number]) : root(step.tree[number]));
    const below = children.length ? list(step, ...children) : element("ul", { role: "list" });
    if (step.bonus && number === leaf(step)) below.append(element("li", {}, own(step.pieces.at(-1))));
    if (below.children.length) item.append(below);
    return item;
  }));
}

/** The last accepted node. */
const leaf = (step) => step.tree.findLastIndex((node, index) => !index || node.accepted);

function root(node) {
  return element("div", { class: "node root" }, element("code", {}, visible(node.text)),
    element("span", { class: "share" }, "already written"));
}

function own(piece) {
  return element("div", { class: "node own" }, element("code", {}, visible(piece.text)),
    element("span", { class: "share" }, "added by the model"));
}

function label(node) {
  const made = element("div", { class: `node${node.accepted ? " accepted" : ""}` }, element("code", {}, visible(node.text)),
    element("meter", { min: 0, max: 1, value: node.probability, "aria-hidden": "true" }),
    element("span", { class: "share" }, `${(100 * node.probability).toFixed(0)} %`));
  if (node.accepted) {
    made.append(element("span", { class: "mark", "aria-hidden": "true" }, "✓"), element("span", { class: "hidden" }, "accepted"));
  }
  return made;
}
