// Draws the page from the JSON beside it, with elements.js and points.js.
const shown = data.candidates.filter((row) => !row.error);
const colors = palette(shown);
const { dot, hidden } = colors;

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

function againstSize() {
  const points = shown.filter((row) => !hidden.has(row.name) && row.size).map((row) => {
    const y = row.means.kl;
    return { name: row.name, x: row.size, y, label: y.mean > 0 ? row.name : `${row.name}: 0`, tip: `${row.name}\n${bytes(row.size)}, ${number(row.bits_per_weight, 3)} bits per weight\nKL ${number(y.mean)}${interval(y)}` };
  });
  if (!points.length) { byId("against-size").textContent = "No candidate says how large it is."; return; }
  scatter(byId("against-size"), points, { xLabel: "size (on disk, else in memory)", xText: bytes, color: colors.color });
}

function charts() {
  againstSize();
  const last = 1 - 1 / Math.max(2, data.plan.positions);
  const place = (share) => -Math.log10(1 - Math.min(share, last));
  const curves = (key) => data.curves.filter((curve) => !hidden.has(curve.name)).map((curve) => ({ name: curve.name, points: curve[key] }));
  lines(byId("percentiles"), curves("percentiles"), { color: colors.color, x: [0, last], place, xLabel: "positions at or below, %", xTicks: [0, 0.9, 0.99, 0.999, 0.9999].filter((tick) => tick <= last), xText: (tick) => `${Number((100 * tick).toFixed(3))}` },
    ([share, value]) => `${Number((100 * share).toFixed(3))} % of positions: KL ≤ ${number(value)}`);
  const places = data.curves.flatMap((curve) => curve.places.map((point) => point[0]));
  lines(byId("places"), curves("places"), { color: colors.color, xLabel: "tokens before", xTicks: places.length ? linearTicks(Math.min(...places), Math.max(...places)) : [], xText: (tick) => String(tick) },
    ([at, value, count]) => `about token ${Math.round(at)}: mean KL ${number(value)} of ${count} positions`);
}

byId("title").textContent = `How far from ${data.reference.name}`;
byId("lead").textContent = `KL(${data.reference.name} ‖ candidate) in nats per token over the whole vocabulary, mean and 95 % interval, the closest candidate first.`;
byId("remarks").append(...data.remarks.map((text) => node("li", {}, text)));
ranking();
legendOf(byId("legend"), shown, colors, charts);
charts();
worst();
blocks();
statistics();
addEventListener("resize", charts);
