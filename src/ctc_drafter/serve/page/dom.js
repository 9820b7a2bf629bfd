// Elements without markup in strings: text from the model becomes HTML in markdown.js alone.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A button that calls `press`. */
export function button(text, press, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", press);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** A token's text where spaces and line ends count. */
export function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(text, label = "Copy", attributes = {}) {
  const made = button(label, async () => {
    made.textContent = (await copied(text())) ? "Copied" : "Not copied";
    setTimeout(() => { made.textContent = label; }, 1500);
  }, attributes);
  return made;
}

/** Whether the clipboard has it. Over plain HTTP from another machine browsers have no `navigator.clipboard`. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = element("textarea", { class: "hidden", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return done;
  }
}
