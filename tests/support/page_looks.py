"""Measurements of how a page looks: boxes of text, colors, and a small gray picture of the whole page.

Invariant: the measurements of boxes and colors are valid with any font. A test compares the small picture with a stored
one only if the page uses the font of the stored picture.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import statistics
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

WIDTHS = {"desk": 1280, "tablet": 768, "phone": 390}
HEIGHT = 844
REFERENCES = ROOT / "tests" / "browser" / "pictures"
WRITE = "BATCHLAB_LOOKS"
"""Environment variable: the value `write` makes the tests write new reference pictures."""
CELLS = 32
"""The width and the height of a small picture, in cells."""
GREYS = 4
"""The size of a shade, in gray levels of 256. A cell stores its distance from the background in 16 shades."""
FAR = 0.2
"""The maximum mean difference between a picture and its reference over all cells, in shades."""
GROUND_FAR = 6
"""The maximum difference between the background of a picture and of its reference, in gray levels of 256."""
MEANT = f"if that is meant: {WRITE}=write pytest tests/browser -k looks"
FONT_SHARE = 0.01
"""The maximum relative difference in the width of a line that still counts as the same font."""

# --- Boxes ---------------------------------------------------------------------------------------

_AMISS = """() => {
  const faults = [];
  const wide = document.documentElement.clientWidth;
  const seen = (one) => {
    const box = one.getBoundingClientRect();
    return one.checkVisibility({ checkVisibilityCSS: true, checkOpacity: true })
      && box.width > 1 && box.height > 1;
  };
  // Hidden from all but screen readers: clipped, or left of the page.
  const unseen = ".visually-hidden, .visually-hidden-focusable, .hidden, .skip";
  const spoken = (one) => one.closest(unseen);
  const name = (one) => {
    const text = (one.textContent || "").trim().replace(/\\s+/g, " ").slice(0, 60);
    return one.tagName.toLowerCase() + (one.id ? "#" + one.id : "") + " " + JSON.stringify(text);
  };
  const lines = [];
  // A question lies over the page, and that is meant.
  const root = document.querySelector("dialog[open]") || document.body;
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, one = node.parentElement;
    if (!node.data.trim() || one.closest("script, style, option, title") || spoken(one)) continue;
    // Of a moment, what is seen stands in the element's shadow.
    const shown = one.shadowRoot ? one : null;
    if (!seen(one) || one.closest("details:not([open]) > :not(summary)")) continue;
    let boxes;
    if (shown || one instanceof SVGElement) boxes = [one.getBoundingClientRect()];
    else {
      const range = document.createRange();
      range.selectNodeContents(node);
      boxes = [...range.getClientRects()];
    }
    for (const box of boxes) if (box.width > 1 && box.height > 1) {
      lines.push({ one, box, top: box.top, bottom: box.bottom, left: box.left, right: box.right });
    }
  }
  if (lines.length < 3) faults.push("there is hardly a word on it");
  for (const line of lines) {
    const { one, box } = line;
    let [left, right] = [0, wide];
    let scrolls = false;
    for (let up = one; up && up !== document.documentElement; up = up.parentElement) {
      const how = getComputedStyle(up).overflowX;
      if (how === "visible") continue;
      if (up.tagName === "svg" || up instanceof SVGElement) continue;
      const limit = up.getBoundingClientRect();
      if ((how === "auto" || how === "scroll") && !up.matches(".table-card")) {
        // What is scrolled away is over nothing.
        line.top = Math.max(line.top, limit.top);
        line.bottom = Math.min(line.bottom, limit.bottom);
        line.left = Math.max(line.left, limit.left);
        line.right = Math.min(line.right, limit.right);
        scrolls = true;
        continue;
      }
      if (scrolls) continue;
      if (box.right > limit.right + 1 || box.left < limit.left - 1
          || box.bottom > limit.bottom + 2) {
        faults.push("cut off by " + name(up).slice(0, 40) + ": " + name(one));
      }
    }
    if (!scrolls && (box.right > right + 1 || box.left < left - 1)) {
      faults.push("beyond the edge: " + name(one));
    }
  }
  const inside = (a, b) => a.contains(b) || b.contains(a);
  lines.sort((a, b) => a.top - b.top);
  for (let i = 0; i < lines.length; i++) {
    for (let k = i + 1; k < lines.length && lines[k].top < lines[i].bottom - 3; k++) {
      const [a, b] = [lines[i], lines[k]];
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 2 && down > 4 && a.one !== b.one && !inside(a.one, b.one)
          && !a.one.closest("nav") === !b.one.closest("nav")) {
        faults.push("over one another: " + name(a.one) + " and " + name(b.one));
      }
    }
  }
  const steered = "a[href], button, input:not([type=hidden]), select, summary";
  for (const one of root.querySelectorAll(steered)) {
    if (!seen(one) || spoken(one) || one.closest("dialog:not([open])")) continue;
    if (one.closest("details:not([open]) > :not(summary)")) continue;
    const boxes = [...one.getClientRects()], box = boxes[0];
    if (!box || box.bottom > innerHeight || box.top < 0) continue;
    const hit = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
    if (hit && !inside(hit, one) && !hit.closest("label")?.contains(one)) {
      faults.push("covered by " + name(hit).slice(0, 40) + ": " + name(one));
    }
  }
  for (const one of document.querySelectorAll("link[rel=stylesheet], style")) {
    if (!one.sheet || !one.sheet.cssRules.length) faults.push("no style: " + (one.href || "style"));
  }
  for (const one of document.querySelectorAll("table")) {
    if (!seen(one)) continue;
    const columns = (row) =>
      [...row.cells].filter(seen).reduce((sum, cell) => sum + cell.colSpan, 0);
    const counts = new Set([...one.rows].filter(seen).map(columns));
    if (counts.size > 1) faults.push("rows of unlike length: " + name(one));
  }
  return [...new Set(faults)];
}"""


def amiss(page: Page) -> list[str]:
    """Return a line for each element that cannot be read at the page's current width: cut off, outside the page,
    overlapping, covered, or without style."""
    found: list[str] = page.evaluate(_AMISS)
    return found


_SETTLED = """() => new Promise((done) => {
  const turn = (left) => requestAnimationFrame(() => {
    if (left) turn(left - 1);
    else done(document.documentElement.scrollHeight);
  });
  turn(3);
})"""


def fit(page: Page, width: int) -> None:
    """Set the width of the page, and its height to that of the content, so that the whole page is visible."""
    page.set_viewport_size({"width": width, "height": HEIGHT})
    before = 0
    # Elements drawn by a script follow the page's width one frame later, and may change the height of the page.
    while (tall := int(page.evaluate(_SETTLED))) != before:
        before = tall
    page.set_viewport_size({"width": width, "height": max(HEIGHT, tall)})
    page.evaluate(_SETTLED)


# --- Colours -------------------------------------------------------------------------------------

_COUNT = """async ([data, wanted, cells]) => {
  const blob = await (await fetch("data:image/png;base64," + data)).blob();
  const image = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data: all } = context.getImageData(0, 0, image.width, image.height);
  const colours = new Map();
  // Most neighbours are alike: counted are runs of them.
  const pixels = new Uint32Array(all.buffer);
  for (let at = 0, from = 0; at < pixels.length; from = at) {
    while (at < pixels.length && pixels[at] === pixels[from]) at++;
    const key = (all[4 * from] << 16) | (all[4 * from + 1] << 8) | all[4 * from + 2];
    colours.set(key, (colours.get(key) || 0) + at - from);
  }
  const most = Math.max(...colours.values());
  const near = wanted.map(([r, g, b]) => {
    let count = 0;
    for (const [key, many] of colours) {
      const far = Math.abs((key >> 16) - r) + Math.abs(((key >> 8) & 255) - g)
        + Math.abs((key & 255) - b);
      if (far <= 24) count += many;
    }
    return count;
  });
  let small = null;
  if (cells) {
    // In halves, so that each pixel counts in its cell.
    let from = canvas, wide = image.width, tall = image.height;
    while (wide > cells || tall > cells) {
      const [w, h] = [Math.max(cells, Math.ceil(wide / 2)), Math.max(cells, Math.ceil(tall / 2))];
      const half = new OffscreenCanvas(w, h), on = half.getContext("2d");
      on.imageSmoothingQuality = "high";
      on.drawImage(from, 0, 0, wide, tall, 0, 0, w, h);
      [from, wide, tall] = [half, w, h];
    }
    const last = new OffscreenCanvas(cells, cells), on = last.getContext("2d");
    on.drawImage(from, 0, 0, wide, tall, 0, 0, cells, cells);
    const grey = on.getImageData(0, 0, cells, cells).data;
    small = [];
    for (let at = 0; at < grey.length; at += 4) {
      small.push((grey[at] * 2126 + grey[at + 1] * 7152 + grey[at + 2] * 722) / 10000);
    }
  }
  return { drawn: 1 - most / (all.length / 4), near, small };
}"""

_COLOURS = """(one) => {
  const paint = (text) => {
    const canvas = new OffscreenCanvas(1, 1), on = canvas.getContext("2d");
    on.fillStyle = text;
    on.fillRect(0, 0, 1, 1);
    return [...on.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  return [...one.querySelectorAll(".keys .key path, .u-legend .u-marker")].map((key) => {
    const how = getComputedStyle(key);
    const text = key.matches(".u-marker") ? how.borderTopColor
      : key.matches(".line") ? how.stroke : how.fill;
    return { name: key.closest("li, tr").textContent.trim(), colour: paint(text) };
  });
}"""


class Eye:
    """An analyzer of pictures, which runs in its own page without a content security policy."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def sees(self, png: bytes, wanted: Sequence[Sequence[int]] = (), cells: int = 0) -> Any:
        """Analyze a picture. `drawn` is the share of pixels that differ from the background. `near` is the number of
        pixels close to each wanted color. `small` is a gray picture of `cells` by `cells` cells."""
        data = base64.b64encode(png).decode()
        return self._page.evaluate(_COUNT, [data, list(wanted), cells])

    def chart(self, chart: Locator, plot: Locator, *, without: Collection[str] = ()) -> list[str]:
        """Return the faults of a chart. Its `plot` must show each color of the legend, except for the entries in
        `without`."""
        keys = [key for key in chart.evaluate(_COLOURS) if key["name"] not in without]
        wanted = [key["colour"] for key in keys]
        name = chart.get_attribute("id") or chart.locator("[id]").first.get_attribute("id")
        found = self.sees(plot.screenshot(), wanted)
        faults = [] if wanted else [f"{name}: it has no legend"]
        if found["drawn"] < 0.003:
            faults.append(f"{name}: it is empty, {found['drawn']:.2%} of it is drawn")
        return faults + [
            f"{name}: nothing of it has the colour of {key['name']!r} in its legend"
            for key, near in zip(keys, found["near"], strict=True)
            if near < 4
        ]


@contextmanager
def eye_of(page: Page) -> Iterator[Eye]:
    """Open an Eye in a separate page of the same browser."""
    browser = page.context.browser
    assert browser
    blank = browser.new_page()
    try:
        yield Eye(blank)
    finally:
        blank.close()


# --- The whole page ------------------------------------------------------------------------------

_WIDTH_OF_A_LINE = """() => {
  const one = document.createElement("span");
  one.textContent = "Jobs, failures, 0123456789 and the grid's own words";
  Object.assign(one.style, { position: "absolute", whiteSpace: "nowrap", fontSize: "16px" });
  document.body.append(one);
  const width = one.getBoundingClientRect().width;
  one.remove();
  return width;
}"""


def _line(page: Page) -> float:
    width: float = page.evaluate(_WIDTH_OF_A_LINE)
    return round(width, 1)


class Looks:
    """Small pictures by name, from one file. `close` writes the file if BATCHLAB_LOOKS is `write`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._writes = os.environ.get(WRITE) == "write"
        self._known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self._new: dict[str, Any] = {}

    def compare(self, page: Page, eye: Eye, name: str) -> None:
        """Fail if the page looks different from its reference. Pages in another font are not compared."""
        width = _line(page)
        small = eye.sees(page.screenshot(animations="disabled"), cells=CELLS)["small"]
        ground = statistics.mode(round(one) for one in small)
        shades = [min(15, round(abs(one - ground) / GREYS)) for one in small]
        if self._writes:
            self._new["line"] = width
            self._new[name] = f"{ground:02x} " + "".join(f"{shade:x}" for shade in shades)
            return
        if not self._is_same_font(width):
            return
        known_ground, known = self._known[name].split(" ")
        before = [int(one, 16) for one in known]
        far = sum(abs(a - b) for a, b in zip(before, shades, strict=True)) / len(before)
        off = abs(int(known_ground, 16) - ground)
        assert far <= FAR, f"{name} differs by {far:.2f} of 16 shades on average; {MEANT}"
        assert off <= GROUND_FAR, f"the ground of {name} differs by {off} greys; {MEANT}"

    def must_be_of_this_font(self, page: Page) -> None:
        """Skip the test if the page uses another font than the reference pictures. In CI, fail instead, because CI must
        have the font."""
        if self._writes or self._is_same_font(_line(page)):
            return
        if os.environ.get("CI"):
            pytest.fail("CI promises DejaVu Sans, but pages are set in another font")
        pytest.skip("pages are set in another font here than the reference pictures")

    def _is_same_font(self, width: float) -> bool:
        known: float = self._known["line"]
        return abs(width - known) <= FONT_SHARE * width

    def close(self) -> None:
        """Add the new pictures to the file. Other test processes may add theirs at the same time."""
        if self._writes:
            self._file.parent.mkdir(exist_ok=True)
            with self._file.open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                known = json.loads(file.read() or "{}")
                file.truncate(0)
                file.write(json.dumps(known | self._new, indent=0, sort_keys=True) + "\n")


def must(faults: Sequence[str], where: str) -> None:
    """Fail with a list of the faults, if there are any."""
    if faults:
        pytest.fail(f"{where}: " + "; ".join(faults[:12]))
