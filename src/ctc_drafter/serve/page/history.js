// The list of the kept chats at the side.

import { asMarkdown } from "./chats.js";
import { button, byId, copyButton, element } from "./dom.js";

export class History {
  /** talk: opens chats, and says which one is open. notice(text, buttons): tells the reader something. */
  constructor(chats, talk, notice) {
    Object.assign(this, { chats, talk, notice });
    byId("show-chats").addEventListener("click", () => this.toggle(byId("chats").hidden));
    byId("close-chats").addEventListener("click", () => this.toggle(false));
    byId("chats").addEventListener("keydown", (event) => event.key === "Escape" && this.toggle(false));
    byId("delete-all").addEventListener("click", () => this.remove(this.chats.list(), "All chats are deleted."));
    byId("chats-tools").prepend(copyButton(() => this.markdown(), "Copy this chat as Markdown", { class: "small" }));
    globalThis.addEventListener?.("storage", () => this.show()); // another tab wrote
  }

  toggle(open) {
    byId("chats").hidden = !open;
    byId("show-chats").setAttribute("aria-expanded", open);
    this.show();
    (open ? byId("close-chats") : byId("show-chats")).focus();
  }

  show() {
    if (byId("chats").hidden) return;
    const chats = this.chats.list();
    byId("chats-list").replaceChildren(...chats.map((chat) => this.item(chat)));
    byId("no-chats").hidden = chats.length > 0;
    byId("chats-tools").hidden = !chats.length;
  }

  item(chat) {
    const open = button(chat.title, () => this.open(chat.id), {
      class: "chat", "aria-current": chat.id === this.talk.id ? "true" : null,
    });
    const gone = button("×", () => this.remove([chat], `“${chat.title}” is deleted.`), {
      class: "small delete", "aria-label": `Delete the chat “${chat.title}”`,
    });
    return element("li", {}, open, gone);
  }

  open(id) {
    this.talk.open(this.chats.read(id));
    if (globalThis.matchMedia?.("(max-width: 45rem)").matches) this.toggle(false); // it lies over the chat there
  }

  remove(chats, text) {
    const open = chats.some((chat) => chat.id === this.talk.id);
    if (open) this.talk.fresh();
    for (const chat of chats) this.chats.remove(chat.id);
    this.notice(text, button("Undo", () => this.restore(chats)));
    this.show();
  }

  restore(chats) {
    for (const chat of chats) this.chats.write(chat);
    this.notice("");
    this.show();
  }

  markdown() {
    this.talk.keep();
    const chat = this.chats.read(this.talk.id);
    return chat ? asMarkdown(chat) : "";
  }
}
