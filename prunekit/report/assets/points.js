// What the pages with tables and scattered points share: numbers, tips, axes, labels. With elements.js.
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6fd1", "#b8860b", "#2f8fc4", "#7d8590"];

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e6) return String(Number(value.toPrecision(digits)));
  return power(value);
}

function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 1000 && unit < 4) { count /= 1000; unit++; }
  return `${Number(count.toPrecision(3))} ${units[unit]}`;
}

const interval = (value, scale = 1) => value.low === null ? "" : ` [${number(scale * value.low, 3)}, ${number(scale * value.high, 3)}]`;
const cell = (text, small = "") => node("td", {}, text, ...(small ? [node("small", {}, small)] : []));

// The rows of a chart, their colours, and which of them are hidden.
function palette(rows) {
  const own = new Map(rows.map((row, index) => [row.name, COLORS[index % COLORS.length]]));
  const hidden = new Set();
  const dot = (name) => node("span", { class: "dot", style: `--own: ${own.get(name)}` });
  return { color: (name) => own.get(name), hidden, dot };
}

function legendOf(box, rows, { hidden, dot }, redraw) {
  for (const row of rows) {
    const toggle = node("button", { type: "button", "aria-pressed": "true", onclick: () => {
      hidden.has(row.name) ? hidden.delete(row.name) : hidden.add(row.name);
      toggle.setAttribute("aria-pressed", String(!hidden.has(row.name)));
      redraw();
    } }, dot(row.name), row.name);
    box.append(toggle);
  }
}

// ---- tooltip ---------------------------------------------------------------------------------

const tip = byId("tip");
function tell(target, text) {
  const show = (event) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18}px`;
  };
  target.addEventListener("pointermove", show);
  target.addEventListener("pointerdown", show);
  target.addEventListener("pointerleave", () => { tip.hidden = true; });
}

// ---- axes ------------------------------------------------------------------------------------

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / 6));
  const factors = high / low < 10 ? [1, 1.5, 2, 3, 5, 7] : last - first <= 2 ? [1, 2, 5] : [1];
  const ticks = [];
  for (let power = first; power <= last; power += every) for (const factor of factors) {
    const value = factor * 10 ** power;
    if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
  }
  return ticks;
}

function linearTicks(low, high) {
  const raw = (high - low || 1) / 4, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(Number((index * step).toPrecision(12)));
  return ticks;
}

// A frame; x is linear unless `ticks` says where its marks are, y is logarithmic unless `linear`.
function frame(box, { x, y, xLabel, xTicks, xText, place = (value) => value, linear = false }) {
  const width = Math.max(280, box.clientWidth || 340), height = 260;
  const left = 52, right = width - 12, top = 12, bottom = height - 40;
  const high = linear ? (value) => value : Math.log10;
  const [x0, x1] = x.map(place), [y0, y1] = y.map(high);
  const toX = (value) => left + (right - left) * (place(value) - x0) / (x1 - x0 || 1);
  const toY = (value) => bottom - (bottom - top) * (high(linear ? value : Math.max(value, y[0])) - y0) / (y1 - y0 || 1);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const tick of linear ? linearTicks(...y) : logTicks(...y)) svg.append(shape("line", { class: "grid", x1: left, x2: right, y1: toY(tick), y2: toY(tick) }), shape("text", { x: left - 6, y: toY(tick) + 4, "text-anchor": "end" }, number(tick, 3)));
  for (const tick of xTicks) svg.append(shape("text", { x: toX(tick), y: bottom + 16, "text-anchor": "middle" }, xText(tick)));
  svg.append(shape("line", { class: "grid", x1: left, x2: right, y1: bottom, y2: bottom }), shape("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
  box.replaceChildren(svg);
  return { svg, toX, toY, left, right, top, bottom };
}

function yRange(values) {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) return [1e-9, 1];
  const high = Math.max(...positive);
  return [Math.max(Math.min(...positive), high / 1e8) / 1.6, high * 1.6];
}

function linearRange(values) {
  const low = Math.min(0, ...values), high = Math.max(0, ...values), room = (high - low || 1) * 0.06;
  return [low < 0 ? low - room : 0, high > 0 ? high + room : 0];
}

// ---- points with names -----------------------------------------------------------------------

const overlap = (one, other) => Math.max(0, Math.min(one.x1, other.x1) - Math.max(one.x0, other.x0)) * Math.max(0, Math.min(one.y1, other.y1) - Math.max(one.y0, other.y0));

// Where a name goes: right or left of its point, then below or above it, past points and names already there.
function placeName(text, { cx, cy }, { left, right, top, bottom }, taken) {
  const wide = Math.min(6.6 * text.length, right - left), centre = Math.max(left, Math.min(cx - wide / 2, right - wide));
  const sides = [cx + 9, cx - 9 - wide].filter((x0) => x0 >= left && x0 + wide <= right);
  const tried = [...sides.flatMap((x0) => [0, 13, -13, 26, -26].map((shift) => [x0, cy + shift])),
    ...[16, -16, 29, -29, 42, -42].map((shift) => [centre, cy + shift])];
  let best;
  for (const [x0, middle] of tried) {
    if (middle - 7 < top || middle + 7 > bottom) continue;
    const box = { x0, x1: x0 + wide, y0: middle - 6, y1: middle + 6 };
    const covered = taken.reduce((sum, other) => sum + overlap(box, other), 0);
    if (!best || covered < best.covered) best = { box, covered };
    if (!covered) break;
  }
  const box = best ? best.box : { x0: centre, x1: centre + wide, y0: cy + 10, y1: cy + 22 };
  taken.push(box);
  return { x: box.x0, y: box.y0 + 10 };
}

// Points {name, x, y: {mean, low, high}, tip, label} with their intervals and names.
function scatter(box, points, { xLabel, xText, linear = false, fromZero = true, color }) {
  const xs = points.map((point) => point.x), most = Math.max(...xs), room = (most - Math.min(...xs) || most) * 0.08;
  const near = !fromZero || Math.min(...xs) > 0.7 * most;
  const x = [near ? Math.min(...xs) - room : 0, most + room];
  const ends = points.flatMap(({ y }) => [y.mean, y.low ?? y.mean, y.high ?? y.mean]);
  const drawn = frame(box, { x, y: linear ? linearRange(ends) : yRange(ends), xLabel, xTicks: linearTicks(...x), xText, linear });
  const { svg, toX, toY } = drawn;
  const places = points.map((point) => ({ cx: toX(point.x), cy: toY(point.y.mean) }));
  const taken = places.map(({ cx, cy }) => ({ x0: cx - 6, x1: cx + 6, y0: cy - 6, y1: cy + 6 }));
  if (linear) svg.append(shape("line", { class: "zero", x1: drawn.left, x2: drawn.right, y1: toY(0), y2: toY(0) }));
  points.forEach((point, index) => {
    const { cx, cy } = places[index], own = color(point.name);
    const { low, high } = point.y;
    if (low !== null && low !== undefined) svg.append(shape("line", { x1: cx, x2: cx, y1: toY(low), y2: toY(high), stroke: own, "stroke-width": 2 }));
    const mark = shape("circle", { cx, cy, r: 5, fill: own });
    tell(mark, point.tip);
    svg.append(mark);
  });
  points.forEach((point, index) => {
    const text = point.label ?? point.name;
    svg.append(shape("text", { class: "name", ...placeName(text, places[index], drawn, taken) }, text));
  });
}

// ---- curves ----------------------------------------------------------------------------------

// Curves {name, points: [[x, y, …]]}; `words` says what a point is. A missing y leaves a gap.
function lines(box, curves, { color, ...options }, words) {
  const all = curves.flatMap((curve) => curve.points).filter((point) => point[1] !== null);
  if (!all.length) { box.replaceChildren(); return; }
  const xs = all.map((point) => point[0]), y = options.y ?? (options.linear ? linearRange : yRange)(all.map((point) => point[1]));
  const drawn = frame(box, { x: options.x ?? [Math.min(...xs), Math.max(...xs)], ...options, y });
  for (const curve of curves) {
    const points = curve.points.filter((point) => point[1] !== null && (options.linear || point[1] > 0 && point[1] >= y[0]));
    const path = points.map(([px, py], index) => `${index ? "L" : "M"}${drawn.toX(px).toFixed(1)},${drawn.toY(py).toFixed(1)}`).join("");
    drawn.svg.append(shape("path", { d: path, fill: "none", stroke: color(curve.name), "stroke-width": 1.8 }));
    for (const point of points) {
      const mark = shape("circle", { cx: drawn.toX(point[0]), cy: drawn.toY(point[1]), r: 6, fill: "transparent" });
      tell(mark, `${curve.name}\n${words(point)}`);
      drawn.svg.append(mark);
    }
  }
}
