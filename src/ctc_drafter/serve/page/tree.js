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
    this.answer?.button.focus();
    this.answer = null;
  }

  move(by) {
    const number = this.number + by;
    if (this.answer && number >= 0 && number < this.answer.steps.length) this.show(number);
  }

  show(number) {
    this.number = number;
    const { steps } = this.answer;
    const step = steps[number];
    byId("tree-title").textContent = `Step ${number} of ${steps.length - 1}`;
    byId("previous").disabled = number === 0;
    byId("next").disabled = number === steps.length - 1;
    byId("tree-summary").textContent = summary(step);
    byId("tree-body").replaceChildren(...(step.tree.length ? [list(step, 0)] : []));
    this.answer.mark(number);
  }
}

function summary(step) {
  if (!step.tree.length) return "The prompt was read; the model wrote the first token itself.";
  const count = step.tree.length - 1;
  const drafted = count ? `${count} ${count === 1 ? "token" : "tokens"} drafted and checked in one pass` : "Nothing was likely enough to draft";
  const bonus = step.bonus ? `; “${visible(step.pieces.at(-1).text)}” added by the model` : "; the answer ends here";
  return `${drafted}, ${step.accepted} accepted${bonus}.`;
}

/** The node with all below it, as nested lists. */
function list(step, ...numbers) {
  return element("ul", {}, ...numbers.map((number) => {
    const children = step.tree.flatMap((node, index) => (index && node.parent === number ? [index] : []));
    const item = element("li", {}, label(step.tree[number], number === 0));
    if (children.length) item.append(list(step, ...children));
    return item;
  }));
}

function label(node, isRoot) {
  const percent = `${(100 * node.probability).toFixed(0)} %`;
  const made = element("div", { class: `node${node.accepted ? " accepted" : ""}` }, element("code", {}, visible(node.text)));
  if (isRoot) {
    made.append(element("span", { class: "share" }, "root, already written"));
    return made;
  }
  made.append(element("meter", { min: 0, max: 1, value: node.probability, "aria-hidden": "true" }),
    element("span", { class: "share" }, percent));
  if (node.accepted) {
    made.append(element("span", { class: "mark", "aria-hidden": "true" }, "✓"), element("span", { class: "hidden" }, "accepted"));
  }
  return made;
}
