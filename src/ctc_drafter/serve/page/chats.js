// Chats kept in the browser: one entry each, so that two tabs do not write over each other.

const CHAT = "ctc-drafter/chat/";

/** JSON in `localStorage`; for this visit only where a browser keeps nothing. */
export class Storage {
  constructor() {
    try {
      this.store = globalThis.localStorage ?? null;
    } catch {
      this.store = null;
    }
    this.visit = new Map();
  }

  read(key) {
    const text = this.store ? this.store.getItem(key) : this.visit.get(key);
    try {
      return JSON.parse(text ?? "null");
    } catch {
      return null; // not ours
    }
  }

  /** false where there is no room. */
  write(key, value) {
    const text = JSON.stringify(value);
    if (!this.store) this.visit.set(key, text);
    try {
      this.store?.setItem(key, text);
      return true;
    } catch {
      return false;
    }
  }

  remove(key) {
    this.visit.delete(key);
    this.store?.removeItem(key);
  }

  keys() {
    const store = this.store;
    return store ? Array.from({ length: store.length }, (_, at) => store.key(at)) : [...this.visit.keys()];
  }
}

export class Chats {
  constructor(storage) {
    this.storage = storage;
  }

  /** All chats, the one changed last first. */
  list() {
    const keys = this.storage.keys().filter((key) => key.startsWith(CHAT));
    const chats = keys.map((key) => this.storage.read(key)).filter((chat) => chat?.id && Array.isArray(chat.turns));
    return chats.sort((one, other) => other.changed - one.changed);
  }

  read(id) {
    const chat = this.storage.read(CHAT + id);
    return chat?.id && Array.isArray(chat.turns) ? chat : null;
  }

  /** false where there is no room. */
  write(chat) {
    return this.storage.write(CHAT + chat.id, chat);
  }

  remove(id) {
    this.storage.remove(CHAT + id);
  }
}

export function newId() {
  return `${Date.now().toString(36)}${Math.floor(Math.random() * 2 ** 30).toString(36)}`;
}

/** A kept chat as Markdown. */
export function asMarkdown(chat) {
  const text = (answer) => answer.steps.flatMap(([, , pieces]) => pieces.filter((_, at) => at % 2)).join("") + answer.tail;
  const parts = chat.turns.map((turn) => `**You:** ${turn.question}\n\n**${turn.drafted.title}:**\n\n${text(turn.drafted)}\n`);
  return [...(chat.system ? [`**System:** ${chat.system}\n`] : []), ...parts].join("\n");
}
