// The fields of the settings, kept in the browser; the API key is not.

import { byId } from "./dom.js";

const KEY = "ctc-drafter/settings";
const NUMBERS = { temperature: "temperature", "top-p": "top_p", "top-k": "top_k", seed: "seed", tokens: "max_tokens" };

export class Settings {
  /** storage: as in `Chats`. */
  constructor(storage) {
    this.storage = storage;
    const kept = storage.read(KEY) ?? {};
    for (const id of Object.keys(NUMBERS)) {
      if (typeof kept[id] === "string") byId(id).value = kept[id];
      byId(id).addEventListener("change", () => this.keep());
    }
    byId("system").value = kept.system ?? "";
    byId("system").addEventListener("change", () => this.keep());
    byId("compare").checked = Boolean(kept.compare);
    byId("compare").addEventListener("change", () => this.keep());
    this.chosen = kept.view === "bursts" ? "bursts" : "text";
  }

  /** What finished answers show: "text" or "bursts". */
  get view() {
    return this.chosen;
  }

  set view(view) {
    this.chosen = view;
    this.keep();
  }

  get key() {
    return byId("key").value;
  }

  get system() {
    return byId("system").value.trim();
  }

  keep() {
    const fields = Object.keys(NUMBERS).filter((id) => byId(id).validity?.valid !== false);
    const values = Object.fromEntries(fields.map((id) => [id, byId(id).value]));
    this.storage.write(KEY, { ...values, system: byId("system").value, compare: byId("compare").checked, view: this.chosen });
  }

  /** The settings as fields of a request. Both answers of a comparison get the same seed. */
  request() {
    const filled = Object.entries(NUMBERS).filter(([id]) => byId(id).value !== "");
    const values = Object.fromEntries(filled.map(([id, name]) => [name, Number(byId(id).value)]));
    return { temperature: 0, seed: Math.floor(Math.random() * 2 ** 31), ...values };
  }
}
