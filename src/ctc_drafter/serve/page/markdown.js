// A finished answer as formatted text. What a model writes is not trusted: HTML in it is shown as text, nothing is
// loaded, links lead to http, https and mail only. marked writes no raw HTML, and DOMPurify lets nothing else through.

import { Marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";
import { copyButton, element } from "./dom.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul", "#text",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ block, text }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    heading({ tokens, depth }) { // below the page's own
      const tag = `h${Math.min(depth + 2, 6)}`;
      return `<${tag}>${this.parser.parseInline(tokens)}</${tag}>`;
    },
  },
});

/** Nodes to append, or null where the browser cannot clean them. */
export function rendered(text) {
  if (!globalThis.DOMPurify?.isSupported) return null;
  const made = globalThis.DOMPurify.sanitize(marked.parse(text), ALLOWED);
  for (const link of made.querySelectorAll("a[href]")) {
    link.setAttribute("rel", "noopener noreferrer");
    link.setAttribute("target", "_blank");
  }
  for (const table of made.querySelectorAll("table")) framed(table, element("div", { class: "wide" }));
  for (const pre of made.querySelectorAll("pre")) frameCode(pre);
  for (const each of made.querySelectorAll("[class]:not(.code, .wide, .code *)")) each.removeAttribute("class");
  return made;
}

function frameCode(pre) {
  const code = pre.querySelector("code");
  const language = code?.className.replace("language-", "") ?? "";
  code?.removeAttribute("class");
  const copy = copyButton(() => pre.textContent, "Copy", { class: "small", "aria-label": "Copy this code" });
  const bar = element("div", { class: "code-bar" }, element("span", {}, language || "text"), copy);
  framed(pre, element("div", { class: "code" }, bar));
}

function framed(node, frame) {
  node.replaceWith(frame);
  frame.append(node);
}

function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}
