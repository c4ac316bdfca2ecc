(function () {
  "use strict";
  const EVERY_MS = 2000;
  const HEIGHT = 190;
  const SHORTEST_S = 120; // of a time axis, because a new grid has only one data point
  const place = document.getElementById("curves");
  const source = place.dataset.source;
  const picker = document.getElementById("curves-pool");
  const CURVES = [
    { at: "curve-fleet", series: [["Desired", "desired", "--curve-3", true], ["In service", "in_service", "--curve-1", false], ["Bundles running", "running", "--curve-2", false]] },
    { at: "curve-queue", series: [["Waiting", "waiting", "--curve-2", false], ["In flight", "in_flight", "--curve-1", false]] },
  ];
  let drawn = [];
  let known = null;

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function options(curve, width) {
    const axis = { stroke: colour("--curve-text"), grid: { stroke: colour("--curve-grid"), width: 1 }, ticks: { stroke: colour("--curve-grid"), width: 1 } };
    const whole = { ...axis, size: 44, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 1000000] };
    return {
      width: width,
      height: HEIGHT,
      scales: { x: { range: (_, low, high) => [Math.min(low, high - SHORTEST_S), high] }, y: { range: (_, low, high) => [0, Math.max(1, high * 1.1)] } },
      axes: [{ ...axis, space: 90, values: [[60, "{HH}:{mm}", null, null, null, null, null, null, 1], [1, "{HH}:{mm}:{ss}", null, null, null, null, null, null, 1]] }, whole],
      legend: { live: false, markers: { width: 2 } },
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      series: [{}].concat(curve.series.map(function (one) {
        const [label, , name, dashed] = one;
        return { label: label, stroke: colour(name), width: 2, dash: dashed ? [5, 4] : undefined, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } };
      })),
    };
  }

  function data(curve, pool) {
    const pools = known.pools.filter((one) => !pool || one.name === pool);
    const sums = curve.series.map(function (one) {
      return known.at_s.map((_, at) => pools.reduce((sum, some) => sum + some[one[1]][at], 0));
    });
    return [known.at_s].concat(sums);
  }

  function told(curve, values) {
    const last = curve.series.map((one, at) => one[0] + " " + (values[at + 1].at(-1) ?? 0));
    return "Now: " + last.join(", ");
  }

  function draw(anew) {
    if (!known) return;
    const pool = picker ? picker.value : "";
    if (anew) {
      drawn.forEach((one) => one.destroy());
      drawn = [];
    }
    CURVES.forEach(function (curve, at) {
      const element = document.getElementById(curve.at);
      const values = data(curve, pool);
      element.setAttribute("aria-label", told(curve, values));
      if (drawn[at]) drawn[at].setData(values);
      else drawn[at] = new uPlot(options(curve, element.clientWidth), values, element);
    });
  }

  async function ask() {
    if (!document.hidden) {
      try {
        const answer = await fetch(source, { headers: { Accept: "application/json" } });
        if (answer.ok) {
          known = await answer.json();
          draw(false);
        }
      } catch {
        // The manager is unavailable. The rest of the page shows this, and the next request may succeed.
      }
    }
    window.setTimeout(ask, EVERY_MS);
  }

  document.addEventListener("theme", () => draw(true));
  new ResizeObserver(function () {
    drawn.forEach(function (one, at) {
      const width = document.getElementById(CURVES[at].at).clientWidth;
      if (width !== one.width) one.setSize({ width: width, height: HEIGHT });
    });
  }).observe(place);
  if (picker) picker.addEventListener("change", () => draw(false));
  ask();
})();
