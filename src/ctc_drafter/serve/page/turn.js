// A question with its answers: the drafter's, and plain decoding's beside it.

import { Answer } from "./answer.js";
import { element } from "./dom.js";

export class Turn {
  /** compare: whether plain decoding answers too. look: as in `Answer`. */
  constructor(question, compare, look) {
    this.question = question;
    this.drafted = new Answer("CTC drafter", look);
    this.plain = compare ? new Answer("Plain decoding", null) : null;
    this.answers = element("div", { class: "answers" }, this.drafted.root, ...(this.plain ? [this.plain.root] : []));
    this.root = element("li", {}, element("p", { class: "question" }, question), this.answers);
  }

  /** why: shown with answers that did not come to their end. */
  settle(why) {
    this.drafted.settle(why);
    this.plain?.settle(why);
  }

  /** Puts the comparison of both answers under them; returns its text. */
  judge() {
    const same = this.drafted.content === this.plain.content;
    const ratio = (this.drafted.speed / this.plain.speed).toFixed(2);
    const text = `${ratio}× the speed of plain decoding, ${same ? "and the same text" : "but another text"}.`;
    this.answers.after(element("p", { class: `verdict ${same ? "same" : "differs"}` }, text));
    return text;
  }
}
