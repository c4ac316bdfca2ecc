// Runs before the first rendering, so that boxes and forms also work while the page still loads.
(function () {
  "use strict";

  function follow(all, from) {
    const boxes = [...all.form.querySelectorAll('input[name="' + all.dataset.all + '"]')];
    for (const box of boxes.slice(from)) box.checked = all.checked;
    return boxes.length;
  }

  const reached = new Map();
  document.addEventListener("change", function (event) {
    const all = event.target;
    if (all.dataset.all) reached.set(all, follow(all, 0));
  });
  document.addEventListener("DOMContentLoaded", function () {
    // Only the rows that loaded after the change. The reader may have changed earlier rows.
    for (const [all, from] of reached) follow(all, from);
  });
  document.addEventListener("input", function (event) {
    if (event.target.id === "desired") document.getElementById("by-hand").checked = true;
  });
  document.addEventListener("submit", function (event) {
    // Repeated clicks send the form only once. A page restored from memory is loaded again.
    const button = event.submitter;
    if (!button) return;
    if (button.getAttribute("aria-disabled") === "true") event.preventDefault();
    button.setAttribute("aria-disabled", "true");
  });
  window.addEventListener("pageshow", function (event) {
    if (event.persisted) window.location.reload();
  });
})();
