// The conversation: questions are asked, asked again, changed; answers go on; the oldest turns are dropped.

import { Answer } from "./answer.js";
import { newId } from "./chats.js";
import { button, byId, element } from "./dom.js";
import { ServerError, stream } from "./stream.js";
import { Turn } from "./turn.js";

const TITLE = 60; // characters
const FULL = "context_length_exceeded";

export class Talk {
  /**
   * panel: shows trees. served(): what the server said of itself, or null. notice(text, ...buttons): tells the reader
   * something. changed(): the kept chats are others now. lost(error): the server failed.
   */
  constructor({ settings, chats, panel, served, notice, changed, lost }) {
    Object.assign(this, { settings, chats, panel, served, notice, changed, lost, running: null });
    this.look = (answer, number) => panel.open(answer, number);
    this.actions = {
      edit: (turn, text) => this.ask(text, this.turns.indexOf(turn)),
      again: (turn) => this.ask(turn.question, this.turns.indexOf(turn), Boolean(turn.plain)),
      goOn: (turn) => this.goOn(turn),
    };
    this.divider = element("li", { class: "divider" }, "The model no longer reads what is above.");
    this.start(newId(), []);
  }

  /** from: the first turn that the model reads. */
  start(id, turns, from = 0) {
    Object.assign(this, { id, turns, from });
    this.arrange();
  }

  /** Puts the turns on the page. */
  arrange() {
    const rows = this.turns.map((turn) => turn.root);
    this.turns.forEach((turn, index) => turn.root.classList.toggle("dropped", index < this.from));
    if (this.from) rows.splice(this.from, 0, this.divider);
    byId("turns").replaceChildren(...rows);
    byId("welcome").hidden = rows.length > 0;
    this.offer();
  }

  offer() {
    this.turns.forEach((turn, index) => turn.offer(index === this.turns.length - 1 && !this.running));
    const context = this.served()?.context;
    byId("counter").textContent = context ? `${this.used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens` : "";
  }

  /** Tokens of the context that the turns take which the model reads. */
  get used() {
    return this.turns.slice(this.from).reduce((sum, turn) => sum + turn.size, 0);
  }

  fresh() {
    this.leave();
    this.start(newId(), []);
    this.notice("");
    byId("prompt").focus();
  }

  /** chat: one that was kept; null for none. */
  open(chat) {
    if (!chat) return;
    this.leave();
    byId("system").value = chat.system ?? "";
    const turns = chat.turns.map((kept) => Turn.unpacked(kept, this.look, this.settings, this.actions));
    this.start(chat.id, turns, chat.from ?? 0);
    byId("talk").scrollTop = byId("talk").scrollHeight;
    this.notice("");
    this.changed();
  }

  leave() {
    this.running?.abort();
    if (!byId("tree").hidden) this.panel.close();
  }

  /** Keeps the chat in the browser. */
  keep(id = this.id, turns = this.turns, from = this.from) {
    if (!turns.length) return;
    const title = turns[0].question.replace(/\s+/g, " ").slice(0, TITLE);
    const chat = { id, title, changed: Date.now(), system: byId("system").value, from, turns: turns.map((turn) => turn.packed()) };
    if (!this.chats.write(chat)) this.notice("The browser has no room for this chat; delete old ones to keep it.");
    this.changed();
  }

  /** Asks; what stood at that place and after it is replaced, unless nothing comes of it. */
  async ask(question, at = this.turns.length, compare = byId("compare").checked) {
    if (this.running) return;
    const { method } = this.served() ?? {};
    const drafts = method !== null;
    const drafted = new Answer(drafts ? methodTitle(method) : "Plain decoding", drafts ? this.look : null, this.settings);
    const plain = drafts && compare ? new Answer("Plain decoding", null, this.settings) : null;
    const turn = new Turn(question, drafted, plain, this.actions);
    const [before, from] = [this.turns, this.from];
    if (at < before.length && !byId("tree").hidden) this.panel.close();
    this.start(this.id, [...before.slice(0, at), turn], Math.min(from, at));
    this.toEnd();
    const gone = await this.write(turn, () => {
      this.start(this.id, before, from);
      if (at === before.length && !byId("prompt").value) byId("prompt").value = question;
    });
    if (gone?.code === FULL) {
      this.full(at, () => {
        if (byId("prompt").value === question) byId("prompt").value = "";
        this.ask(question, at, compare);
      });
    }
  }

  /** The answer goes on where it was cut. */
  async goOn(turn) {
    if (this.running) return;
    const error = await this.write(turn, () => {});
    if (error?.code === FULL) this.full(this.turns.length - 1, () => this.goOn(turn));
  }

  /** Writes a turn's answers; takes back, by `undo`, what came to nothing. Returns the error, if there was one. */
  async write(turn, undo) {
    const { id, turns, from } = this;
    const controller = new AbortController();
    let failed = null;
    this.notice("");
    this.busy(controller);
    turn.begin();
    this.offer();
    this.changed();
    try {
      await this.run(turn, controller.signal);
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof ServerError)) throw error;
      if (error instanceof ServerError) failed = error;
    } finally {
      this.following(() => this.settle(turn, { id, turns, from }, controller.signal.aborted, failed, undo));
    }
    return failed;
  }

  /** The end of `write`, for the chat that it began in, which may not be the open one any more. */
  settle(turn, { id, turns, from }, stopped, failed, undo) {
    const here = this.id === id;
    turn.settle(stopped ? "Stopped." : `Cut off${failed ? `: ${failed.message}` : "."}`);
    this.busy(null);
    if (turn.drafted.content) this.keep(id, turns, from);
    else if (here) {
      undo();
      this.changed();
    }
    if (!here) return;
    this.offer();
    if (failed && failed.code !== FULL) {
      this.notice(failed.message);
      this.lost(failed);
    } else if (this.isFull(turn)) this.full(this.turns.length - 1, () => this.goOn(turn));
  }

  /** Whether an answer was cut because the context holds no more. */
  isFull(turn) {
    const served = this.served();
    return turn.drafted.finish === "length" && served !== null && this.used >= served.longest_prompt;
  }

  /** The drafter's answer, then plain decoding's: one after the other, so that the speeds can be compared. */
  async run(turn, signal) {
    const request = { messages: this.messages(turn), ...this.settings.request() };
    byId("status").textContent = "The answer is being written.";
    await this.fill(turn, turn.drafted, request, signal);
    byId("status").textContent = `Answer: ${turn.drafted.content}`;
    if (!turn.plain) return;
    await this.fill(turn, turn.plain, { ...request, plain: true }, signal);
    this.following(() => { byId("status").textContent = turn.judge(); });
  }

  messages(turn) {
    const system = this.settings.system ? [{ role: "system", content: this.settings.system }] : [];
    const before = this.turns.slice(this.from, this.turns.indexOf(turn)).flatMap((each) =>
      [{ role: "user", content: each.question }, { role: "assistant", content: each.drafted.content }]);
    return [...system, ...before, { role: "user", content: turn.question }];
  }

  async fill(turn, answer, request, signal) {
    if (answer.finish === "stop") return; // it has come to its end, the other has not
    const before = this.used - turn.size;
    answer.begin();
    await stream({ ...request, answer: answer.ids }, this.settings.key, signal, (name, data) => this.following(() => {
      if (name === "step") {
        answer.add(data);
        this.panel.grew(answer);
      } else if (name === "end") {
        answer.end(data);
        if (answer === turn.drafted) turn.size = Math.max(data.usage.total_tokens - before, 0);
      } else throw new ServerError(data.error.message, undefined, data.error.code);
    }));
    if (!answer.done) throw new ServerError("The server stopped in the middle of the answer.");
  }

  /** Offers a new chat, or to drop turns before the one at that place. */
  full(at, retry) {
    this.following(() => this.tellFull(at, retry));
  }

  tellFull(at, retry) {
    const buttons = [button("New chat", () => this.fresh())];
    if (this.from < at) {
      buttons.push(button("Drop the oldest turns", () => {
        this.drop(at);
        retry();
      }));
      this.notice("This chat is full: the model can read no more. Start a new one, or drop its oldest turns.", ...buttons);
    } else if (at) this.notice("This chat is full: the model can read no more. Start a new one.", ...buttons);
    else this.notice("The model cannot read as much at once. Shorten the message or the system prompt.", ...buttons);
  }

  /** One turn at least, and until half of the context is free. */
  drop(at) {
    do this.from += 1; while (this.from < at && this.used > this.served().context / 2);
    this.arrange();
  }

  /** A hidden button would lose the focus. */
  busy(controller) {
    const focused = document.activeElement;
    this.running = controller;
    byId("send").hidden = Boolean(controller);
    byId("stop").hidden = !controller;
    document.body?.classList.toggle("busy", Boolean(controller));
    const lost = focused === document.body || focused?.isConnected === false;
    if (controller && (focused === byId("send") || lost || focused?.hidden)) byId("stop").focus();
    if (!controller && (focused === byId("stop") || lost)) byId("prompt").focus();
  }

  /** Stays at the end of the conversation, if that is where the reader is. */
  following(change) {
    const talk = byId("talk");
    const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
    change();
    if (follows) this.toEnd();
    this.offerJump();
  }

  toEnd() {
    byId("talk").scrollTop = byId("talk").scrollHeight;
    this.offerJump();
  }

  offerJump() {
    const talk = byId("talk");
    byId("jump").hidden = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120;
  }
}

const TITLES = {
  ctc: "CTC drafter", "ctc-paper": "CTC drafter of the paper", "ctc-linear": "CTC drafter, linear", medusa: "Medusa", hydra: "Hydra",
  "hydra++": "Hydra++", dflash: "DFlash", dspark: "DSpark", eagle: "EAGLE", prompt_lookup: "Prompt lookup",
};

/** A method's name as readers know it; undefined before the server has said it. */
export const methodTitle = (method) => TITLES[method] ?? method ?? "Drafter";
