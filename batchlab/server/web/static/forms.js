// Before anything is drawn, so that what a quick reader ticks or sends while the page still loads
// counts as it does later.
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
    // Only the rows that came after the tick: of the others the reader may have changed some.
    for (const [all, from] of reached) follow(all, from);
  });
  document.addEventListener("input", function (event) {
    if (event.target.id === "desired") document.getElementById("by-hand").checked = true;
  });
  document.addEventListener("submit", function (event) {
    // Sent once, however often it is clicked; a page that comes back from memory starts anew.
    const button = event.submitter;
    if (!button) return;
    if (button.getAttribute("aria-disabled") === "true") event.preventDefault();
    button.setAttribute("aria-disabled", "true");
  });
  window.addEventListener("pageshow", function (event) {
    if (event.persisted) window.location.reload();
  });
})();
