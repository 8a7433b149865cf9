// Loaded before the page is drawn, so that it is not drawn in the other theme first. No module: those run later.
"use strict";
(() => {
  const known = ["auto", "light", "dark"];
  const root = document.documentElement;
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("kata-theme") || "auto";
  } catch {
    // without storage the choice lasts as long as the page
  }
  const set = (name) => {
    root.dataset.theme = known.includes(name) ? name : "auto";
  };
  set(chosen);
  window.kataTheme = {
    get: () => root.dataset.theme,
    set(name) {
      set(name);
      try {
        localStorage.setItem("kata-theme", root.dataset.theme);
      } catch {
        // as above
      }
    },
  };
})();
