// Light or dark, before anything is painted: a plain script in the head. Without a choice it is the system's.

{
  const KEY = "ctc-drafter/theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  let kept = null;
  try {
    kept = localStorage.getItem(KEY);
  } catch { /* a browser that keeps nothing */ }
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;

  const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

  function keep(theme) {
    try {
      if (theme) localStorage.setItem(KEY, theme);
      else localStorage.removeItem(KEY);
    } catch { /* it holds for this visit */ }
  }

  /** The other one; where that is the system's own, the page follows the system again. */
  function change() {
    const wanted = isDark() ? "light" : "dark";
    const own = wanted === (dark.matches ? "dark" : "light");
    if (own) delete root.dataset.theme;
    else root.dataset.theme = wanted;
    keep(own ? null : wanted);
    tell();
  }

  function tell() {
    document.getElementById("theme")?.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  }

  dark.addEventListener("change", tell);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme")?.addEventListener("click", change);
    tell();
  });
}
