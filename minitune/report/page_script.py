"""The script of the report: values at the pointer. The page works without it.

All charts share the axis of steps, so one position moves the cursors of all of them. The position
is that of a record of the chart that is pointed at; arrow keys move it to the next record. The
script reads the curves' points and texts from the paths (charts.py).
"""

SCRIPT = """
"use strict";
const UNITS = 1000, MARGIN = 10;
const charts = [...document.querySelectorAll(".chart")].map((figure) => {
  const dots = figure.querySelectorAll(".dot");
  const texts = figure.querySelectorAll(".legend b");
  const curves = [...figure.querySelectorAll("path[data-steps]")].map((path, i) => ({
    points: path.getAttribute("d").slice(1).split(/[LM]/).map((p) => p.split(" ").map(Number)),
    steps: path.dataset.steps.split(" "),
    values: path.dataset.values.split(";"),
    dot: dots[i],
    text: texts[i],
    last: texts[i].textContent,
  }));
  const plot = figure.querySelector(".plot");
  const places = new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])));
  const records = [...places].sort((a, b) => a - b).map((x) => [x]);
  return { figure, plot, curves, records, cursor: plot.querySelector(".cursor"),
           step: figure.querySelector(".step") };
});

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return x - points[low][0] <= points[high][0] - x ? low : high;
}

function moveDot(curve, i) {
  curve.dot.setAttribute("cx", curve.points[i][0] / UNITS * 100 + "%");
  curve.dot.setAttribute("cy", curve.points[i][1] / UNITS * 100 + "%");
}

function show(x) {
  position = x;
  for (const chart of charts) {
    chart.figure.classList.add("pointed");
    chart.cursor.setAttribute("x1", x / UNITS * 100 + "%");
    chart.cursor.setAttribute("x2", x / UNITS * 100 + "%");
    let shown = null;
    for (const curve of chart.curves) {
      const points = curve.points, i = nearest(points, x);
      const isOutside = x > points[points.length - 1][0] + MARGIN || x < points[0][0] - MARGIN;
      curve.text.textContent = isOutside ? "\\u2013" : curve.values[i];
      moveDot(curve, i);
      if (!isOutside && shown === null) shown = curve.steps[i];
    }
    chart.step.textContent = shown === null ? "" : "step " + Number(shown).toLocaleString("en");
  }
}

function hide() {
  position = null;
  for (const chart of charts) {
    chart.figure.classList.remove("pointed");
    chart.step.textContent = "";
    for (const curve of chart.curves) {
      curve.text.textContent = curve.last;
      moveDot(curve, curve.points.length - 1);
    }
  }
}

let position = null;
for (const { plot, records } of charts) {
  plot.setAttribute("tabindex", "0");
  const follow = (event) => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * UNITS;
    show(records[nearest(records, x)][0]);
  };
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const count = records.length;
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -count, End: count };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    const from = position === null ? count - 1 : nearest(records, position);
    show(records[Math.min(count - 1, Math.max(0, from + moves[event.key]))][0]);
  });
}
"""
