// Sets the light or dark theme before the first rendering, as chosen here or by the system.
(function () {
  "use strict";
  const KEY = "batchlab-theme";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function chosen() {
    const kept = localStorage.getItem(KEY);
    return kept === "light" || kept === "dark" ? kept : dark.matches ? "dark" : "light";
  }

  function apply() {
    document.documentElement.dataset.bsTheme = chosen();
    document.dispatchEvent(new Event("theme"));
  }

  apply();
  dark.addEventListener("change", apply);
  document.addEventListener("click", function (event) {
    if (!event.target.closest("#theme")) return;
    localStorage.setItem(KEY, chosen() === "dark" ? "light" : "dark");
    apply();
  });
})();
