// Draws every chart of the page with uPlot, in the page's colours: see megassm/report/charts.py for what a chart is.
const dark = matchMedia("(prefers-color-scheme: dark)");
const charts = [];
let chosen = "updates", logX = false;

const exact = value => value == null ? "\u2013" : Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 });
const short = value => value == null ? "" : Math.abs(value) < 1e4
  ? Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 })
  : value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 });

function ramp(stops, place) {  // as charts.ramp does
  const at = place * (stops.length - 1), first = Math.min(Math.floor(at), stops.length - 2);
  const part = (stop, i) => parseInt(stops[stop].slice(i, i + 2), 16);
  return "#" + [1, 3, 5].map(i => Math.round(part(first, i) + (at - first) * (part(first + 1, i) - part(first, i)))
    .toString(16).padStart(2, "0")).join("");
}

// uPlot's data: one x for all lines, and for each line its y and what is drawn with it
function aligned(chart, xs, axis) {
  const tables = chart.lines.map(line => [xs[line.x][axis], ...["y", "raw", "low", "high"].filter(n => line[n]).map(n => line[n])]);
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
  if (chart.kind === "stack") {  // lines of a stack have one x, and nothing but y
    for (let i = 2; i < data.length; i++) data[i] = data[i].map((v, at) => v == null ? v : v + (data[i - 1][at] ?? 0));
  }
  return data;
}

function seriesOf(chart, palette, stops, paper) {
  const series = [{}], bands = [], stack = chart.kind === "stack";
  chart.lines.forEach((line, number) => {
    const colour = line.place == null ? palette[number % palette.length] : ramp(stops, line.place), at = series.length;
    const dash = line.place == null && number >= palette.length ? [6, 4] : undefined;
    const own = { spanGaps: true, points: { show: (line.y.length < 25 && !stack) } };
    const value = (u, v, s, i) => {
      if (v == null || i == null) return "\u2013";
      const shown = stack && s > 1 ? v - (u.data[s - 1][i] ?? 0) : v;
      const low = line.low && u.data[at + (line.raw ? 2 : 1)][i];
      return exact(shown) + (low == null ? "" : ` (${exact(low)} \u2026 ${exact(u.data[at + (line.raw ? 3 : 2)][i])})`);
    };
    series.push({ ...own, label: line.label, value, dash, width: stack ? 1 : 1.6, stroke: stack ? paper : colour,
                  fill: stack && number === 0 ? colour : undefined, markerFill: colour });
    if (stack && number > 0) bands.push({ series: [at, at - 1], fill: colour });
    if (line.raw) series.push({ ...own, class: "helper", width: 0.6, stroke: colour + "55", points: { show: false } });
    if (line.low) {
      for (const _ of [0, 1]) series.push({ ...own, class: "helper", width: 0, points: { show: false } });
      bands.push({ series: [series.length - 1, series.length - 2], fill: colour + "2b" });
    }
  });
  return { series, bands };
}

function options(chart, figure, data, width) {
  const style = getComputedStyle(document.documentElement), css = name => style.getPropertyValue(name).trim();
  const isDark = dark.matches && !document.documentElement.classList.contains("printing");
  const { series, bands } = seriesOf(chart, isDark ? COLOURS.dark : COLOURS.light, isDark ? COLOURS.dark_ramp : COLOURS.light_ramp, css("--paper"));
  const axis = chart.ticks.length ? Object.keys(chart.x)[0] : chosen, powers = chart.ticks.length > 0;
  const line = { stroke: css("--faint"), font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif",
                 grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, labelSize: 20 };
  const positive = values => values.filter(v => v > 0);
  series[0] = { label: axis, value: (u, v) => exact(v) };
  const around = (u, low, high) => powers ? [low / 1.1, high * 1.1] : [Math.max(low, Math.min(...positive(u.data[0]))), high];
  const log = { distr: 3, log: powers ? 2 : 10, range: around };
  const marks = { draw: u => {
    if (!chart.mark) return;
    const x = u.valToPos(chart.mark[0], "x", true), { top, height } = u.bbox, c = u.ctx;
    c.save(); c.strokeStyle = c.fillStyle = css("--faint"); c.setLineDash([4, 4]); c.beginPath(); c.moveTo(x, top);
    c.lineTo(x, top + height); c.stroke(); c.textAlign = "left"; c.fillText(chart.mark[1], x + 6, top + 14 * devicePixelRatio); c.restore();
  } };
  return {
    width, height: Math.round(Math.min(320, Math.max(220, width * 0.62))), series, bands,
    hooks: { draw: [marks.draw] },
    scales: {
      x: { time: false, ...(powers || logX ? log : {}) },
      y: figure.log ? { distr: 3, log: 10 } : chart.zero
        ? { range: (u, low, high) => [0, chart.kind === "stack" ? 100 : (high || 1) * 1.05] } : {},
    },
    axes: [
      { ...line, label: axis, values: (u, at) => at.map(short), ...(powers ? { splits: () => chart.ticks, filter: (u, at) => at } : { space: 60 }) },
      { ...line, label: chart.y_label, size: 58, values: (u, at) => at.map(short) },
    ],
    legend: { markers: { width: 0, fill: (u, i) => series[i].markerFill ?? "transparent" } },
    cursor: {
      ...(powers ? {} : { sync: { key: chosen, scales: ["x", null] } }),
      dataIdx: (u, s, at) => {  // the nearest point that this line has
        if (s === 0 || u.data[s][at] != null) return at;
        for (let by = 1; by < u.data[s].length; by++) {
          if (u.data[s][at - by] != null) return at - by;
          if (u.data[s][at + by] != null) return at + by;
        }
        return at;
      },
      points: { size: 6 },
    },
  };
}

function draw(figure) {
  figure.plot?.destroy();
  const { chart, xs, place } = figure, axis = chart.ticks.length ? Object.keys(chart.x)[0] : chosen;
  const data = aligned(chart, xs, axis);
  figure.plot = new uPlot(options(chart, figure, data, Math.floor(place.clientWidth)), data, place);
}

for (const group of document.querySelectorAll("[data-charts]")) {
  const { xs, charts: own } = JSON.parse(group.querySelector("script").textContent);
  group.querySelectorAll("figure").forEach((element, number) => {
    const chart = own[number], figure = { chart, xs, place: element.querySelector(".plot"), log: chart.log };
    chart.x = xs[chart.lines[0].x];
    if (chart.kind !== "stack") {
      const button = document.createElement("button");
      const say = () => { button.textContent = figure.log ? "linear" : "log"; button.ariaLabel = `${button.textContent} y axis`; };
      button.addEventListener("click", () => { figure.log = !figure.log; say(); draw(figure); });
      say();
      element.querySelector("figcaption").prepend(button);
    }
    charts.push(figure);
  });
}

const first = document.querySelector("[data-choose]");
if (first) {
  const bar = document.createElement("fieldset");
  bar.className = "choose";
  bar.innerHTML = "<legend>x axis:</legend>" + ["updates", "tokens", "hours"].map(name =>
    `<label><input type="radio" name="axis" value="${name}"${name === chosen ? " checked" : ""}> ${name}</label>`).join("")
    + '<label><input type="checkbox" name="log"> log</label><span>Drag to zoom, double click to go back.</span>';
  bar.addEventListener("change", event => {
    if (event.target.name === "log") logX = event.target.checked; else chosen = event.target.value;
    charts.filter(figure => !figure.chart.ticks.length).forEach(draw);
  });
  first.before(bar);
}

charts.forEach(draw);
let widthBefore = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== widthBefore) { widthBefore = innerWidth; charts.forEach(draw); }
});
dark.addEventListener("change", () => charts.forEach(draw));
const printing = on => () => { document.documentElement.classList.toggle("printing", on); if (dark.matches) charts.forEach(draw); };
addEventListener("beforeprint", printing(true));
addEventListener("afterprint", printing(false));
