// Draws the page from the JSON beside it, with elements.js.
const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6fd1", "#b8860b", "#2f8fc4", "#7d8590"];
const shown = data.candidates.filter((row) => !row.error);
const colorOf = new Map(shown.map((row, index) => [row.name, COLORS[index % COLORS.length]]));
const hidden = new Set();

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
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
const dot = (name) => node("span", { class: "dot", style: `--own: ${colorOf.get(name)}` });
const cell = (text, small = "") => node("td", {}, text, ...(small ? [node("small", {}, small)] : []));

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

// ---- tables ----------------------------------------------------------------------------------

function ranking() {
  const heads = ["candidate", "on disk", "in memory", "bits/weight", "mean KLD", "median", "99 %", "99.9 %", "same top", "PPL ratio"];
  const body = data.candidates.map((row) => {
    if (row.error) return node("tr", {}, node("td", {}, row.name), node("td", { class: "failed", colspan: heads.length - 1 }, `failed: ${row.error}`));
    const { means, summary } = row;
    return node("tr", {},
      node("td", {}, dot(row.name), row.name),
      cell(bytes(row.bytes_on_disk)), cell(bytes(row.bytes_in_memory)), cell(number(row.bits_per_weight, 3)),
      cell(number(means.kl.mean), interval(means.kl)),
      ...["kl_median", "kl_p99", "kl_p99.9"].map((name) => cell(number(summary[name], 3))),
      cell(`${(100 * means.same_top.mean).toFixed(2)} %`), cell(number(means.ppl_ratio.mean, 5), interval(means.ppl_ratio)));
  });
  byId("ranking").append(node("thead", {}, node("tr", {}, ...heads.map((head) => node("th", {}, head)))), node("tbody", {}, ...body));
}

const STATISTICS = [
  ["KL(reference‖candidate)", "kl"], ["KL(candidate‖reference)", "kl_reverse"], ["Jensen–Shannon", "js"],
  ["total variation", "total_variation"], ["1 − cos(p, q)", "one_minus_cos_prob"], ["same top token", "same_top"],
  [`overlap of the top ${data.topk}`, "overlap"], ["Δp, mean", "prob_delta"], ["Δp, RMS", "prob_delta_rms"],
  ["entropy, reference", "entropy_base"], ["entropy, candidate", "entropy_other"], ["PPL, reference", "ppl_base"],
  ["PPL, candidate", "ppl_other"], ["PPL ratio", "ppl_ratio"], ["ln PPL ratio", "ln_ppl_ratio"],
];
const SPREAD = ["min", "p1", "p5", "p10", "p25", "median", "p75", "p90", "p95", "p99", "p99.9", "max"];

function statistics() {
  const rows = STATISTICS.filter(([, name]) => shown.some((row) => row.means[name])).map(([label, name]) => node("tr", {}, node("td", {}, label),
    ...shown.map((row) => cell(number(row.means[name].mean), interval(row.means[name])))));
  for (const [label, key] of [["KL", "kl"], ["Δp", "prob_delta"]]) for (const end of SPREAD) {
    const name = end.startsWith("p") ? `${end.slice(1)} %` : end;
    rows.push(node("tr", {}, node("td", {}, `${label}, ${name}`), ...shown.map((row) => cell(number(row.summary[`${key}_${end}`])))));
  }
  byId("statistics").append(node("thead", {}, node("tr", {}, node("th", {}, "nats, shares of 1"), ...shown.map((row) => node("th", {}, dot(row.name), row.name)))), node("tbody", {}, ...rows));
}

function blocks() {
  const unit = data.plan.block_unit;
  byId("blocks-title").textContent = unit === "document" ? "By document" : "By window of the text";
  const names = [unit, "positions", ...shown.map((row) => row.name)];
  let by = names[2] ?? names[0], down = true;
  const draw = () => {
    const order = [...data.blocks].sort((a, b) => (a[by] < b[by] ? -1 : a[by] > b[by] ? 1 : 0) * (down ? -1 : 1));
    const heads = names.map((name) => node("th", { "aria-sort": name === by ? (down ? "descending" : "ascending") : "none" }, node("button", { type: "button", onclick: () => {
      down = name === by ? !down : true;
      by = name;
      draw();
    } }, `${name}${name === by ? (down ? " ↓" : " ↑") : ""}`)));
    const body = order.map((row) => node("tr", {}, ...names.map((name, index) => cell(index ? number(row[name]) : row[name]))));
    byId("blocks").replaceChildren(node("thead", {}, node("tr", {}, ...heads)), node("tbody", {}, ...body));
  };
  draw();
}

function worst() {
  const select = byId("whose");
  for (const row of shown) select.append(node("option", { value: row.name }, row.name));
  const side = (label, tokens) => node("div", {}, node("p", {}, label), ...tokens.map(([text, share]) => node("span", { class: "token" }, node("code", {}, text.replaceAll("\n", "⏎")), node("small", {}, ` ${(100 * share).toFixed(share < 0.001 ? 3 : 1)} %`))));
  const draw = () => byId("worst").replaceChildren(...(data.worst[select.value] ?? []).map((place) => node("li", {},
    node("div", { class: "where" }, `KL ${number(place.kl)} nats · token ${place.index} of window ${place.window + 1}`),
    node("div", { class: "text" }, "… ", place.before, node("b", {}, place.token.replaceAll("\n", "⏎\n"))),
    node("div", { class: "sides" }, side(data.reference.name, place.base), side(select.value, place.other)))));
  select.addEventListener("change", draw);
  // The row of rounding says least: begin with the farthest candidate.
  if (shown.length) select.value = shown[shown.length - 1].name;
  draw();
}

// ---- charts ----------------------------------------------------------------------------------

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
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(index * step);
  return ticks;
}

// A frame with a logarithmic y axis; x is linear unless `ticks` says where its marks are.
function frame(box, { x, y, xLabel, xTicks, xText, place = (value) => value }) {
  const width = Math.max(280, box.clientWidth || 340), height = 260;
  const left = 52, right = width - 12, top = 12, bottom = height - 40;
  const [x0, x1] = x.map(place), [y0, y1] = y.map(Math.log10);
  const toX = (value) => left + (right - left) * (place(value) - x0) / (x1 - x0 || 1);
  const toY = (value) => bottom - (bottom - top) * (Math.log10(Math.max(value, y[0])) - y0) / (y1 - y0 || 1);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const tick of logTicks(...y)) svg.append(shape("line", { class: "grid", x1: left, x2: right, y1: toY(tick), y2: toY(tick) }), shape("text", { x: left - 6, y: toY(tick) + 4, "text-anchor": "end" }, number(tick, 3)));
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

function againstSize() {
  const points = shown.filter((row) => !hidden.has(row.name) && row.size);
  if (!points.length) { byId("against-size").textContent = "No candidate says how large it is."; return; }
  const sizes = points.map((row) => row.size), high = Math.max(...sizes) * 1.08;
  const low = Math.min(...sizes) > 0.7 * high ? Math.min(...sizes) * 0.9 : 0;
  const y = yRange(points.flatMap((row) => [row.means.kl.mean, row.means.kl.low ?? 0, row.means.kl.high ?? 0]));
  const { svg, toX, toY, left, right, bottom } = frame(byId("against-size"), { x: [low, high], y, xLabel: "size (on disk, else in memory)", xTicks: linearTicks(low, high), xText: bytes });
  const taken = [];
  for (const row of points) {
    const { mean, low: from, high: to } = row.means.kl, cx = toX(row.size), cy = toY(mean), own = colorOf.get(row.name);
    if (from !== null) svg.append(shape("line", { x1: cx, x2: cx, y1: toY(from), y2: toY(to), stroke: own, "stroke-width": 2 }));
    const mark = shape("circle", { cx, cy, r: 5, fill: own });
    tell(mark, `${row.name}\n${bytes(row.size)}, ${number(row.bits_per_weight, 3)} bits per weight\nKL ${number(mean)}${interval(row.means.kl)}`);
    svg.append(mark);
    // A name goes beside its point, moved down or up past names already there.
    const wide = 6.4 * row.name.length, end = cx + 9 + wide > right;
    const from2 = end ? cx - 9 - wide : cx + 9;
    let at = cy + 4;
    for (const shift of [0, 13, -13, 26, -26, 39, -39]) {
      at = cy + 4 + shift;
      if (at < bottom - 2 && at > 14 && !taken.some(([a, b, t]) => from2 < b && from2 + wide > a && Math.abs(t - at) < 12)) break;
    }
    taken.push([from2, from2 + wide, at]);
    svg.append(shape("text", { class: "name", x: end ? Math.max(cx - 9, left + wide) : cx + 9, y: at, "text-anchor": end ? "end" : "start" }, mean > 0 ? row.name : `${row.name}: 0`));
  }
}

function lines(box, key, options, words) {
  const curves = data.curves.filter((curve) => !hidden.has(curve.name));
  const all = curves.flatMap((curve) => curve[key]);
  if (!all.length) { box.replaceChildren(); return; }
  const xs = all.map((point) => point[0]);
  const y = yRange(all.map((point) => point[1]));
  const drawn = frame(box, { x: options.x ?? [Math.min(...xs), Math.max(...xs)], y, ...options });
  for (const curve of curves) {
    const points = curve[key].filter((point) => point[1] > 0 && point[1] >= y[0]);
    const path = points.map(([px, py], index) => `${index ? "L" : "M"}${drawn.toX(px).toFixed(1)},${drawn.toY(py).toFixed(1)}`).join("");
    drawn.svg.append(shape("path", { d: path, fill: "none", stroke: colorOf.get(curve.name), "stroke-width": 1.8 }));
    for (const point of points) {
      const mark = shape("circle", { cx: drawn.toX(point[0]), cy: drawn.toY(point[1]), r: 6, fill: "transparent" });
      tell(mark, `${curve.name}\n${words(point)}`);
      drawn.svg.append(mark);
    }
  }
}

function charts() {
  againstSize();
  const last = 1 - 1 / Math.max(2, data.plan.positions);
  const place = (share) => -Math.log10(1 - Math.min(share, last));
  lines(byId("percentiles"), "percentiles", { x: [0, last], place, xLabel: "positions at or below, %", xTicks: [0, 0.9, 0.99, 0.999, 0.9999].filter((tick) => tick <= last), xText: (tick) => `${Number((100 * tick).toFixed(3))}` },
    ([share, value]) => `${Number((100 * share).toFixed(3))} % of positions: KL ≤ ${number(value)}`);
  const places = data.curves.flatMap((curve) => curve.places.map((point) => point[0]));
  lines(byId("places"), "places", { xLabel: "tokens before", xTicks: places.length ? linearTicks(Math.min(...places), Math.max(...places)) : [], xText: (tick) => String(tick) },
    ([at, value, count]) => `about token ${Math.round(at)}: mean KL ${number(value)} of ${count} positions`);
}

function legend() {
  for (const row of shown) {
    const toggle = node("button", { type: "button", "aria-pressed": "true", onclick: () => {
      hidden.has(row.name) ? hidden.delete(row.name) : hidden.add(row.name);
      toggle.setAttribute("aria-pressed", String(!hidden.has(row.name)));
      charts();
    } }, dot(row.name), row.name);
    byId("legend").append(toggle);
  }
}

byId("title").textContent = `How far from ${data.reference.name}`;
byId("lead").textContent = `KL(${data.reference.name} ‖ candidate) in nats per token over the whole vocabulary, mean and 95 % interval, the closest candidate first.`;
byId("remarks").append(...data.remarks.map((text) => node("li", {}, text)));
ranking();
legend();
charts();
worst();
blocks();
statistics();
addEventListener("resize", charts);
