// A question with its answers: the drafter's, and plain decoding's beside it.

import { Answer } from "./answer.js";
import { button, element } from "./dom.js";

export class Turn {
  /**
   * answers: the drafter's, and plain decoding's or null. actions: `edit(turn, text)`, `again(turn)` and
   * `goOn(turn)`, called by the buttons. size: tokens of the context that it takes, as far as known.
   */
  constructor(question, drafted, plain, actions) {
    Object.assign(this, { question, drafted, plain, actions, size: 0 });
    this.asked = element("div", { class: "asked" });
    this.verdict = element("p", { class: "verdict", hidden: true });
    this.more = button("Continue", () => actions.goOn(this), { class: "small more", hidden: true });
    this.again = button("Regenerate", () => actions.again(this), { class: "small again", hidden: true });
    if (plain) plain.follows = true;
    drafted.beside = plain;
    drafted.tools.prepend(this.more);
    drafted.copy.after(this.again);
    this.answers = element("div", { class: "answers" }, drafted.root, ...(plain ? [plain.root] : []));
    this.root = element("li", {}, this.asked, this.verdict, this.answers);
    this.ask();
  }

  /** The question, with a button to change it. */
  ask() {
    this.change = button("Edit", () => this.edit(), { class: "small edit", "aria-label": "Edit this message" });
    this.asked.replaceChildren(this.change, element("p", { class: "question" }, this.question));
  }

  edit() {
    const field = element("textarea", { "aria-label": "Your message, edited", rows: 3 });
    field.value = this.question;
    const leave = () => {
      this.ask();
      this.change.focus();
    };
    const send = () => {
      const text = field.value.trim();
      if (!text) return;
      this.ask(); // as it was, should nothing come of the new one
      this.actions.edit(this, text);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    const row = element("div", { class: "row" }, element("p", { class: "quiet" }, "What was said after it is left out."),
      button("Ask this", send, { class: "main" }), button("Cancel", leave));
    this.asked.replaceChildren(element("div", { class: "editing" }, field, row));
    field.focus();
  }

  /** The answers that are there. */
  get all() {
    return this.plain ? [this.drafted, this.plain] : [this.drafted];
  }

  begin() {
    this.verdict.hidden = this.more.hidden = this.again.hidden = true;
  }

  /** why: shown with answers that did not come to their end. */
  settle(why) {
    for (const answer of this.all) answer.settle(why);
    this.judge();
  }

  /** last: whether it is the chat's last turn, which alone can go on or be written again. */
  offer(last) {
    this.more.hidden = !(last && this.drafted.finish !== "stop" && this.drafted.ids.length);
    this.again.hidden = !last;
  }

  /** Puts the comparison of both answers over them; returns its text, empty where one is not there. */
  judge() {
    if (!this.plain?.done || !this.drafted.done) return "";
    const same = this.drafted.content === this.plain.content;
    const speed = compared(this.drafted.speed / this.plain.speed);
    const text = same ? "same text" : "another text";
    const kind = !same ? "differs" : speed.endsWith("slower") ? "slower" : "same";
    this.verdict.setAttribute("class", `verdict ${kind}`);
    this.verdict.replaceChildren(element("strong", {}, speed), `, ${text}`);
    this.verdict.hidden = false;
    return `${speed}, ${text}`;
  }

  packed() {
    return { question: this.question, size: this.size, drafted: this.drafted.packed(), plain: this.plain?.packed() ?? null };
  }

  static unpacked(kept, look, settings, actions) {
    const [drafted, plain] = [kept.drafted, kept.plain].map((each) => each && Answer.unpacked(each, look, settings));
    const made = new Turn(kept.question, drafted, plain, actions);
    made.size = kept.size;
    drafted.showAs(drafted.look ? settings.view : "text");
    made.judge();
    return made;
  }
}

/** "2.3× faster", by how many times the speed is the other one. */
export function compared(ratio) {
  const [times, word] = ratio < 1 ? [1 / ratio, "slower"] : [ratio, "faster"];
  return times < 1.05 ? "As fast" : `${times.toFixed(1)}× ${word}`;
}
