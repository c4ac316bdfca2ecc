(function () {
  "use strict";

  // Stores the place of the session for a visit to the sign-in page. Only pages of this port can
  // read it.
  const place = document.body.dataset.place;
  if (place) localStorage.setItem("batchlab-place", place);
  // The place of an ended session would load the sign-in page twice, and the second load would
  // discard what the visitor has already typed.
  const logOut = document.getElementById("log-out");
  if (logOut) logOut.addEventListener("submit", () => localStorage.removeItem("batchlab-place"));

  // A time in the reader's time zone. A shadow root shows it, and the server's text does not change,
  // so that an update finds no difference.
  const MOMENT = { year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  const moments = new Intl.DateTimeFormat("en-CA", MOMENT);
  class LocalTime extends HTMLElement {
    static observedAttributes = ["datetime"];
    attributeChangedCallback() {
      const at = new Date(this.getAttribute("datetime"));
      if (Number.isNaN(at.getTime())) return;
      if (!this.shadowRoot) this.attachShadow({ mode: "open" });
      if (this.getAttribute("unless") === moments.resolvedOptions().timeZone) {
        this.shadowRoot.replaceChildren();
        return;
      }
      // Date and time are separate elements, so that a narrow column breaks between them.
      const words = moments.format(at).split(", ").flatMap(function (text) {
        const word = document.createElement("span");
        word.part = "word";
        word.textContent = text;
        return [" ", word];
      });
      this.shadowRoot.replaceChildren(this.getAttribute("before") || "", ...words.slice(1));
    }
  }
  customElements.define("local-time", LocalTime);
  const zone = document.getElementById("zone");
  if (zone) zone.textContent = moments.resolvedOptions().timeZone;

  // --- Updates ---------------------------------------------------------------------------------

  const away = document.getElementById("away");
  document.body.addEventListener("htmx:beforeRequest", function (event) {
    const polls = event.detail.elt.id === "live";
    const picking = document.getSelection().toString() !== "";
    // The page is hidden, or an update would remove the selection of text.
    if (polls && (document.hidden || picking)) event.preventDefault();
  });
  document.body.addEventListener("htmx:afterRequest", function (event) {
    if (event.detail.elt.id === "live") away.hidden = event.detail.successful;
  });

  // A live log shows its end, unless the reader has scrolled up.
  const LOG = "pre[data-follow]";
  let follows = true;
  function scrollToEnd() {
    const log = document.querySelector(LOG);
    if (log && follows) log.scrollTop = log.scrollHeight;
  }
  document.body.addEventListener("htmx:beforeSwap", function () {
    const log = document.querySelector(LOG);
    follows = !log || log.scrollHeight - log.scrollTop - log.clientHeight < 24;
  });
  document.body.addEventListener("htmx:afterSwap", scrollToEnd);
  scrollToEnd();

  // --- Dialogs ---------------------------------------------------------------------------------

  const dialog = document.getElementById("dialog");
  document.addEventListener("click", function (event) {
    const link = event.target.closest("[data-dialog]");
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
      event.preventDefault();
      htmx.ajax("GET", link.getAttribute("href"), { target: "#dialog-body", swap: "innerHTML" });
    } else if (event.target.closest("#dialog [data-close]") || event.target === dialog) {
      event.preventDefault();
      dialog.close();
    } else if (event.target.closest("[data-back]") && window.history.length > 1) {
      event.preventDefault();
      window.history.back();
    }
  });
  document.body.addEventListener("htmx:afterSwap", function (event) {
    if (event.detail.target.id !== "dialog-body" || dialog.open) return;
    const title = dialog.querySelector("h1");
    if (title) dialog.setAttribute("aria-label", title.textContent);
    dialog.showModal();
  });
})();
