// `grid open` puts a code into the fragment of the address. A browser does not send the fragment,
// so no log contains it. The code is removed from the address before its use, and opens the page
// once.
(function () {
  "use strict";
  const code = window.location.hash.slice(1);
  if (!code) {
    // A page of the session stores its place again, so an ended session is tried only once.
    const place = localStorage.getItem("batchlab-place");
    localStorage.removeItem("batchlab-place");
    if (place && !document.querySelector("[role=alert]")) window.location.replace(place);
    return;
  }
  window.history.replaceState(null, "", window.location.pathname);
  const form = document.getElementById("login");
  form.elements.word.value = code;
  form.submit();
})();
