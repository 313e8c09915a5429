// Draws the page from the JSON beside it, with elements.js.
const study = JSON.parse(document.getElementById("study").textContent);

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value === 0 || Number.isInteger(value) && size < 1e6) return String(value);
  if (size < 1e-3 || size >= 1e6) return power(value);
  if (size > 0.99 && size < 1) return value.toFixed(size > 0.9999 ? 6 : 4);
  return String(Number(value.toPrecision(4)));
}

const interval = (low, high) => low === null || low === undefined || low === high ? "" : `[${number(low)}, ${number(high)}]`;
const color = (role) => `var(--${role})`;

// ---- tooltip ---------------------------------------------------------------------------------

// One tip at a time. `gone` undoes what its owner marked; `place` gives the point it belongs to when the page scrolls.
const tip = byId("tip");
let owner = {};
function showTip(content, x, y, { gone, place } = {}) {
  if (owner.gone && owner.gone !== gone) owner.gone();
  owner = { gone, place };
  tip.replaceChildren(content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth - 8 ? Math.max(8, x - width - 16) : x + 16;
  const top = y + 18 + height > innerHeight - 8 ? Math.max(8, y - height - 14) : y + 18;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}
function hideTip() {
  tip.hidden = true;
  owner.gone?.();
  owner = {};
}
function moveTip() {
  const at = owner.place?.();
  if (at) showTip(tip.firstChild, ...at, owner); else hideTip();
}
addEventListener("scroll", moveTip, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
// A tap shows a tip that stays: a finger that is lifted leaves the element without going elsewhere.
addEventListener("pointerdown", (event) => { if (!event.target.closest?.("[data-tips]")) hideTip(); });
function tips(element, show) {
  element.setAttribute("data-tips", "");
  element.addEventListener("pointermove", show);
  element.addEventListener("pointerdown", show);
  element.addEventListener("pointercancel", hideTip);
  element.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hideTip(); });
}

// ---- names that are too long -----------------------------------------------------------------

const middle = (text, most) => text.length <= most ? text : `${text.slice(0, Math.ceil((most - 1) / 2))}…${text.slice(text.length - Math.floor((most - 1) / 2))}`;

// Names of at most so many characters each: what all of them begin with gives way first, then their middles.
function shortened(names, most) {
  if (names.every((name) => name.length <= most)) return names;
  const parts = names.map((name) => /^((?:✓ )?[A-Z]\. )?(.*)$/s.exec(name).slice(1).map((part) => part ?? ""));
  let alike = names.length > 1 ? Math.min(...parts.map(([, text]) => text.length)) : 0;
  for (const [, text] of parts) while (!text.startsWith(parts[0][1].slice(0, alike))) alike -= 1;
  alike = parts[0][1].lastIndexOf(" ", alike - 1) + 1;
  return parts.map(([mark, text]) => mark + middle(alike > 8 ? `…${text.slice(alike)}` : text, most - mark.length));
}

// ---- scales ----------------------------------------------------------------------------------

function linearTicks(low, high, wanted) {
  const span = high - low || 1;
  const raw = span / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(Number((index * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / 6));
  const factors = last - first <= 2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = first; power <= last; power += every) for (const factor of factors) {
    const value = factor * 10 ** power;
    if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
  }
  return ticks;
}

function valuesOf(chart, hidden) {
  return chart.series.filter((series) => !hidden.has(series.name))
    .flatMap((series) => [...series.mean, ...series.low, ...series.high]).filter((value) => value !== null);
}

// A chart of cosines shows 1 − cosine on its logarithmic scale: there the differences are.
function asShown(chart, state) {
  if (!state.log || !chart.log_complement) return chart;
  const flip = (values) => values.map((value) => value === null ? null : Math.max(0, Number((1 - value).toPrecision(5))));
  const series = chart.series.map((one) => ({ ...one, mean: flip(one.mean), low: flip(one.high), high: flip(one.low) }));
  return { ...chart, series, y_label: chart.log_complement, y_range: null };
}

function yDomain(charts, state) {
  let values = charts.flatMap((chart) => valuesOf(chart, state.hidden));
  if (state.log) {
    values = values.filter((value) => value > 0);
    if (!values.length) return [1e-6, 1];
    const means = charts.flatMap((chart) => chart.series.filter((s) => !state.hidden.has(s.name)).flatMap((s) => s.mean)).filter((value) => value > 0);
    const low = Math.max(Math.min(...values), Math.min(...means) / 10);
    return [low / 1.3, Math.max(...values) * 1.3];
  }
  if (charts[0].y_range) return charts[0].y_range;
  if (!values.length) return [0, 1];
  let low = Math.min(...values), high = Math.max(...values);
  if (charts[0].kind !== "lines") high = Math.max(0, high);
  if (charts[0].kind !== "lines" || low > 0 && low < 0.4 * high) low = Math.min(0, low);
  if (low === high) { low -= low ? Math.abs(low) * 0.1 : 0.5; high += high ? Math.abs(high) * 0.1 : 0.5; }
  const room = (high - low) * 0.04;
  return [low === 0 ? 0 : low - room, high === 0 ? 0 : high + room];
}

// ---- charts ----------------------------------------------------------------------------------

// `group`: the charts that share one y scale, toggles and log switch (often just this one).
function plot(chart, group) {
  const state = group.state;
  const box = node("article", { class: "chart", id: `chart-${chart.key}` });
  const head = node("header", {}, node("h3", { text: chart.title }));
  const drawing = node("div");
  const legend = node("div", { class: "legend" });
  if (chart.kind === "lines") {
    const toggle = node("button", { type: "button", onclick: () => { state.log = !state.log; group.redraw(); } });
    head.append(toggle);
    group.listeners.push(() => { toggle.textContent = state.log ? (chart.log_complement ? "1 − cosine, log" : "log scale") : "linear scale"; toggle.title = "Switch the vertical scale"; });
  }
  const boxed = chart.kind === "lines" ? "" : " box";
  for (const series of chart.series) {
    const swatch = node("span", { class: `swatch${series.dashed ? " dashed" : ""}${boxed}`, style: `--role:${color(series.role)}` });
    const entry = node("button", { type: "button", title: "Show or hide", onclick: () => {
      state.hidden.has(series.name) ? state.hidden.delete(series.name) : state.hidden.add(series.name);
      group.redraw();
    } }, swatch, series.name);
    group.listeners.push(() => entry.setAttribute("aria-pressed", String(!state.hidden.has(series.name))));
    legend.append(entry);
  }
  if (chart.marks.length) legend.append(node("span", { class: "mark-name" }, node("span", { class: "swatch mark-swatch" }), chart.marks_name));
  box.append(head, legend, drawing);
  if (chart.note) box.append(node("p", { class: "note", text: chart.note }));
  box.append(dataTable(chart));
  const draw = () => {
    const width = Math.max(260, drawing.clientWidth || 460);
    const painter = chart.kind === "hbars" ? paintHorizontalBars : paintAxes;
    const domain = yDomain(group.charts.map((one) => asShown(one, state)), state);
    drawing.replaceChildren(painter(asShown(chart, state), state, domain, width));
  };
  group.listeners.push(draw);
  new ResizeObserver(() => draw()).observe(drawing);
  return box;
}

// What a chart shows, for those who hear it: some have categories where others have a named axis.
const labelOf = (chart, value, by) => `${chart.title}: ${value} by ${by || chart.categories.join(", ")}. Arrow keys read the values.`;

function paintAxes(chart, state, [low, high], width) {
  const height = 270, left = 56, right = 10, top = 8, bottom = 42;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: "0", "aria-label": labelOf(chart, chart.y_label, chart.x_label) });
  const shown = chart.series.filter((series) => !state.hidden.has(series.name));
  const positions = [...new Set(chart.series.flatMap((series) => series.x))].sort((a, b) => a - b);
  const gap = Math.min(...positions.slice(1).map((x, i) => x - positions[i]), positions.length > 1 ? Infinity : 1);
  const pad = chart.kind === "lines" ? (chart.marks.length ? 0.5 : 0) : 0.6 * gap;
  const xLow = (positions[0] ?? 0) - pad, xHigh = (positions.at(-1) ?? 1) + pad;
  const inner = width - left - right;
  const px = (x) => left + (xHigh === xLow ? 0.5 : (x - xLow) / (xHigh - xLow)) * inner;
  const scale = state.log ? Math.log10 : (value) => value;
  const py = (y) => top + (1 - (scale(y) - scale(low)) / (scale(high) - scale(low))) * (height - top - bottom);
  const ok = (value) => value !== null && value !== undefined && (!state.log || value > 0);
  for (const mark of chart.marks) {
    svg.append(shape("rect", { class: "mark", x: px(mark - 0.5), width: px(mark + 0.5) - px(mark - 0.5), y: top, height: height - top - bottom }));
  }
  for (const tick of state.log ? logTicks(low, high) : linearTicks(low, high, 5)) {
    svg.append(shape("line", { class: "grid-line", x1: left, x2: width - right, y1: py(tick), y2: py(tick) }));
    svg.append(shape("text", { x: left - 7, y: py(tick) + 4, "text-anchor": "end" }, number(tick)));
  }
  if (chart.kind === "bars") {
    chart.categories.forEach((name, index) => wrapLabel(svg, name, px(index), height - bottom + 15, inner / chart.categories.length));
  } else {
    for (const tick of linearTicks(Math.ceil(xLow), Math.floor(xHigh), Math.max(2, inner / 60)).filter(Number.isInteger)) {
      svg.append(shape("text", { x: px(tick), y: height - bottom + 16, "text-anchor": "middle" }, tick));
    }
  }
  svg.append(shape("line", { class: "base-line", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(shape("text", { class: "axis-label", x: left + inner / 2, y: height - 5, "text-anchor": "middle" }, chart.x_label));
  svg.append(shape("text", { class: "axis-label", transform: `translate(12 ${top + (height - top - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, chart.y_label));
  const floor = state.log ? low : Math.max(0, low);
  shown.forEach((series, order) => {
    const stroke = color(series.role);
    if (chart.kind !== "lines") {
      const slot = inner / (xHigh - xLow) * gap * 0.8, thickness = slot / shown.length;
      series.x.forEach((x, i) => {
        if (!ok(series.mean[i])) return;
        const from = px(x) - slot / 2 + order * thickness + thickness * 0.05;
        const y = py(series.mean[i]);
        svg.append(shape("rect", { x: from, width: thickness * 0.9, y: Math.min(y, py(floor)), height: Math.abs(py(floor) - y), rx: 2, style: `fill:${stroke}` }));
        if (ok(series.low[i]) && series.low[i] !== series.high[i]) svg.append(shape("path", { d: whisker(from + thickness * 0.45, py(series.low[i]), py(series.high[i])), style: "stroke:var(--ink);fill:none" }));
      });
      return;
    }
    if (series.low.length) {
      for (const run of runs(series, (i) => ok(series.mean[i]) && series.low[i] !== null && series.high[i] !== null)) {
        const up = run.map((i) => `${px(series.x[i])},${py(series.high[i])}`);
        const down = run.map((i) => `${px(series.x[i])},${py(Math.max(series.low[i], state.log ? low : -Infinity))}`).reverse();
        svg.append(shape("path", { d: `M${[...up, ...down].join("L")}Z`, style: `fill:${stroke};fill-opacity:.15` }));
      }
    }
    for (const run of runs(series, (i) => ok(series.mean[i]))) {
      const d = `M${run.map((i) => `${px(series.x[i]).toFixed(1)},${py(series.mean[i]).toFixed(1)}`).join("L")}`;
      svg.append(shape("path", { d, style: `stroke:${stroke};fill:none;stroke-width:2;stroke-linejoin:round;${series.dashed ? "stroke-dasharray:6 4" : ""}` }));
      if (run.length === 1) svg.append(shape("circle", { cx: px(series.x[run[0]]), cy: py(series.mean[run[0]]), r: 3, style: `fill:${stroke}` }));
    }
    series.valid.forEach((share, i) => {
      if (share !== null && share < 0.5 && ok(series.mean[i])) svg.append(shape("path", { d: cross(px(series.x[i]), py(series.mean[i])), style: `stroke:${stroke};stroke-width:1.6` }));
    });
  });
  const cursor = shape("line", { class: "base-line", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  hover(svg, chart, shown, positions, px, cursor, top, width);
  return svg;
}

const whisker = (x, y1, y2) => `M${x} ${y1}V${y2}M${x - 3} ${y1}h6M${x - 3} ${y2}h6`;
const cross = (x, y) => `M${x - 3.5} ${y - 3.5}l7 7M${x - 3.5} ${y + 3.5}l7 -7`;

function runs(series, usable) {
  const found = [];
  let open = [];
  series.x.forEach((_, i) => {
    if (usable(i)) open.push(i);
    else if (open.length) { found.push(open); open = []; }
  });
  if (open.length) found.push(open);
  return found;
}

function hover(svg, chart, shown, positions, px, cursor, top, width) {
  let at = -1;
  const show = (index, clientX, clientY) => {
    at = Math.max(0, Math.min(positions.length - 1, index));
    const x = positions[at];
    cursor.setAttribute("x1", px(x));
    cursor.setAttribute("x2", px(x));
    cursor.setAttribute("visibility", "visible");
    showTip(tipTable(chart, shown, x), clientX, clientY, { gone });
  };
  const gone = () => cursor.setAttribute("visibility", "hidden");
  const point = (event) => {
    if (!positions.length) return;
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * width;
    const nearest = positions.reduce((best, position, index) => Math.abs(px(position) - x) < Math.abs(px(positions[best]) - x) ? index : best, 0);
    show(nearest, event.clientX, event.clientY);
  };
  tips(svg, point);
  svg.addEventListener("blur", hideTip);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !positions.length) return;
    event.preventDefault();
    const frame = svg.getBoundingClientRect();
    const next = Math.max(0, Math.min(positions.length - 1, at + step));
    show(next, frame.left + px(positions[next]) / width * frame.width, frame.top + top);
  });
}

function tipTable(chart, shown, x) {
  const table = node("table");
  for (const series of shown) {
    const i = series.x.indexOf(x);
    if (i < 0) continue;
    const share = series.valid[i];
    const note = share === undefined || share === null ? "" : `valid at ${number(100 * share)} %`;
    table.append(node("tr", {}, node("td", {}, node("span", { style: `color:${color(series.role)}`, text: "■ " }), series.name),
      node("td", {}, node("b", { text: number(series.mean[i]) })), node("td", { text: interval(series.low[i], series.high[i]) }), node("td", { text: note })));
  }
  const place = chart.categories.length ? chart.categories[x] : `${chart.x_label.replace(/ \(.*/, "")} ${x}`;
  return node("div", {}, node("b", { text: place }), table);
}

function wrapLabel(svg, name, x, y, room) {
  const most = Math.max(4, Math.floor(room / 6.2));
  const lines = [""];
  for (const word of name.split(" ")) {
    if (lines.at(-1) && (lines.at(-1) + " " + word).length > most) lines.push(word);
    else lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  }
  lines.slice(0, 2).forEach((line, index) => {
    const cut = middle(line, most);
    svg.append(shape("text", { x, y: y + index * 12, "text-anchor": "middle" }, index === 1 && lines.length > 2 ? `${cut}…` : cut));
  });
}

function paintHorizontalBars(chart, state, [low, high], width) {
  const shown = chart.series.filter((series) => !state.hidden.has(series.name));
  const bar = 12, gap = 10, top = 4, bottom = 40;
  const row = bar * Math.max(1, shown.length) + gap;
  const height = top + bottom + row * chart.categories.length;
  const left = Math.min(width * 0.42, 20 + 6.6 * Math.max(4, ...chart.categories.map((name) => name.length)));
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: "0", "aria-label": labelOf(chart, chart.x_label, chart.y_label) });
  const px = (x) => left + (x - low) / (high - low) * (width - left - 14);
  for (const tick of linearTicks(low, high, 4)) {
    svg.append(shape("line", { class: "grid-line", x1: px(tick), x2: px(tick), y1: top, y2: height - bottom }));
    svg.append(shape("text", { x: px(tick), y: height - bottom + 15, "text-anchor": "middle" }, number(tick)));
  }
  const names = shortened(chart.categories, Math.floor((left - 12) / 6.3));
  chart.categories.forEach((name, index) => {
    const y = top + index * row;
    const text = shape("text", { x: left - 8, y: y + row / 2 + gap / 2, "text-anchor": "end" }, names[index]);
    text.append(shape("title", {}, name));
    svg.append(text);
    shown.forEach((series, order) => {
      const i = series.x.indexOf(index);
      if (i < 0 || series.mean[i] === null) return;
      const from = px(Math.max(low, Math.min(0, high))), to = px(series.mean[i]);
      const rect = shape("rect", { x: Math.min(from, to), width: Math.max(1, Math.abs(to - from)), y: y + gap / 2 + order * bar, height: bar - 1, rx: 2, style: `fill:${color(series.role)}` });
      svg.append(rect);
    });
    const target = shape("rect", { x: 0, width, y, height: row, fill: "transparent" });
    tips(target, (event) => showTip(tipTable(chart, shown, index), event.clientX, event.clientY));
    svg.append(target);
  });
  let at = -1;
  svg.addEventListener("blur", hideTip);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    at = Math.max(0, Math.min(names.length - 1, at + step));
    const frame = svg.getBoundingClientRect();
    showTip(tipTable(chart, shown, at), frame.left + left, frame.top + top + at * row);
  });
  svg.append(shape("text", { class: "axis-label", x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, chart.x_label));
  return svg;
}

function dataTable(chart) {
  const details = node("details", {}, node("summary", { text: "Numbers" }));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    const positions = [...new Set(chart.series.flatMap((series) => series.x))];
    const names = chart.series.map((series) => node("th", { text: series.name }));
    const table = node("table", {}, node("tr", {}, node("th", { text: chart.categories.length ? "" : chart.x_label }), ...names));
    for (const x of positions) {
      const cells = chart.series.map((series) => {
        const i = series.x.indexOf(x);
        return node("td", { class: "num", text: i < 0 ? "" : `${number(series.mean[i])} ${interval(series.low[i], series.high[i])}` });
      });
      table.append(node("tr", {}, node("td", { text: chart.categories.length ? chart.categories[x] : x }), ...cells));
    }
    details.append(node("div", { class: "scroll" }, table));
  });
  return details;
}

function drawFigures() {
  const host = byId("charts");
  host.append(node("h2", { text: "Charts" }), node("p", { class: "lead", text: "Point at a curve or tap it for its value and interval, click a name to hide it, and switch the scale. Bands are 95 % intervals." }));
  for (const figure of study.figures) {
    const grid = node("div", { class: figure.charts.length % 2 ? "grid" : "grid even" });
    host.append(node("div", { class: "titled" }, node("h3", { id: figure.key, text: figure.title }), node("p", { class: "lead", text: figure.text })), grid);
    const groups = figure.share_y ? [figure.charts] : figure.charts.map((chart) => [chart]);
    for (const charts of groups) {
      const group = { charts, state: { hidden: new Set(), log: charts[0].log }, listeners: [], redraw() { for (const listener of this.listeners) listener(); } };
      for (const chart of charts) grid.append(plot(chart, group));
      group.redraw();
    }
  }
}

// ---- summary ---------------------------------------------------------------------------------

function drawSummary() {
  byId("title").append(study.names.dense, node("span", { class: "to", text: "→" }), study.names.pruned);
  for (const chip of study.chips) byId("chips").append(node("span", { text: chip }));
  study.hierarchy.forEach((space, index) => {
    if (index) byId("hierarchy").append(node("div", { class: "arrow", text: "→", "aria-hidden": "true" }));
    byId("hierarchy").append(node("div", { class: "space", style: `--role:${color(space.role)}` },
      node("div", { class: "name" }, node("b", { text: space.role }), space.name),
      node("div", { class: "value", text: number(space.value.mean) }),
      node("div", { class: "interval", text: interval(space.value.low, space.value.high) }),
      node("div", { class: "interval", text: space.text })));
  });
  for (const sentence of study.sentences) byId("sentences").append(node("p", { class: sentence.warn ? "warn" : "", text: sentence.text }));
  for (const table of study.tables) {
    const made = node("table", { class: "summary" }, node("caption", { text: table.title }), node("tr", {}, ...table.columns.map((name) => node("th", { text: name }))));
    for (const row of table.rows) made.append(node("tr", {}, ...row.map(cell)));
    byId("tables").append(node("div", { class: "scroll" }, made));
  }
  for (const [name, value] of study.meta) byId("meta").append(node("tr", {}, node("th", { text: name }), node("td", { text: value })));
}

function cell(value, index) {
  if (typeof value === "string" || value === null) return node("td", { class: index ? "what" : "", text: value ?? "–" });
  const unit = value.unit ? ` ${value.unit}` : "";
  return node("td", { class: "num" }, `${number(value.mean)}${unit} `, node("small", { text: interval(value.low, value.high) }));
}

// Buttons of which one is pressed.
function choose(host, choices, then) {
  for (const [value, text] of choices) {
    const button = node("button", { type: "button", text, "aria-pressed": String(value === choices[0][0]), onclick: () => {
      for (const other of host.children) other.setAttribute("aria-pressed", String(other === button));
      then(value);
    } });
    host.append(button);
  }
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
});
