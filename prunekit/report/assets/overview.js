// Draws the page of several copies from the JSON beside it, with elements.js and points.js.
const shown = data.copies.filter((row) => !row.error);
const colors = palette(shown);
// key, name, factor, linear axis, what is better
const QUALITIES = [
  ["kl_dense_pruned", "KL(dense‖copy), nats per token", 1, false, "lower"],
  ["accuracy_difference", "accuracy − the dense model's, points", 100, true, "higher"],
  ["exact_match_difference", "exact match − the dense model's, points", 100, true, "higher"],
  ["flipped", "positions with another likeliest token, %", 100, true, "lower"],
  ["pruned_chrf", "chrF to the dense texts", 1, true, "higher"],
  ["pruned_exact_prefix_share", "text before the first difference, %", 100, true, "higher"],
].filter(([key]) => shown.some((row) => row.scores[key]));

const scaled = (value, scale) => value && { mean: scale * value.mean, low: value.low === null ? null : scale * value.low, high: value.high === null ? null : scale * value.high };
const told = (value) => value ? [number(value.mean), interval(value)] : ["–", ""];

function ranking() {
  const asked = shown.some((row) => row.scores.pruned_accuracy);
  const answered = shown.some((row) => row.scores.pruned_exact_match);
  const timed = shown.some((row) => row.speed);
  const heads = ["copy", "on disk", "in memory", "bits/weight", ...(timed ? ["tokens/s", "× dense"] : []), "KL, nats",
    ...(asked ? ["accuracy", "change, points", "right → wrong, back"] : []),
    ...(answered ? ["exact match", "its change, points", "same answer"] : []), "identical texts", "chrF"];
  const body = data.copies.map((row) => {
    if (row.error) return node("tr", {}, node("td", {}, row.name), node("td", { class: "failed", colspan: heads.length - 1 }, `failed: ${row.error}`));
    const { scores, speed } = row;
    return node("tr", {},
      node("td", {}, colors.dot(row.name), node("a", { href: `${encodeURIComponent(row.folder)}/index.html` }, row.name)),
      cell(bytes(row.bytes_on_disk)), cell(bytes(row.bytes_in_memory)), cell(number(row.bits_per_weight, 3)),
      ...(timed ? [cell(speed ? number(speed.decode, 3) : "–"), cell(speed ? speed.speedup.toFixed(2) : "–", speed ? ` ${speed.low.toFixed(2)} to ${speed.high.toFixed(2)}` : "")] : []),
      cell(...told(scores.kl_dense_pruned)),
      ...(asked ? [cell(`${number(100 * scores.pruned_accuracy.mean, 3)} %`), cell(...told(scaled(scores.accuracy_difference, 100))), cell(`${row.lost}, ${row.gained}`, ` p = ${number(row.mcnemar_p, 2)}`)] : []),
      ...(answered ? [cell(`${number(100 * scores.pruned_exact_match.mean, 3)} %`), cell(...told(scaled(scores.exact_match_difference, 100))), cell(`${number(100 * scores.pruned_same_answer.mean, 3)} %`)] : []),
      cell(`${number(100 * scores.pruned_identical.mean, 3)} %`), cell(...told(scores.pruned_chrf)));
  });
  byId("ranking").append(node("thead", {}, node("tr", {}, ...heads.map((head) => node("th", {}, head)))), node("tbody", {}, ...body));
}

function charts() {
  const [key, name, scale, linear, better] = QUALITIES[byId("quality").selectedIndex];
  const rows = shown.filter((row) => !colors.hidden.has(row.name) && row.scores[key]);
  const point = (row, x, words) => {
    const y = scaled(row.scores[key], scale);
    return { name: row.name, x, y, tip: `${row.name}\n${words}\n${name}: ${number(y.mean)}${interval(y)}`, label: !linear && y.mean === 0 ? `${row.name}: 0` : row.name };
  };
  const draw = (box, points, options) => points.length ? scatter(byId(box), points, { ...options, linear, color: colors.color }) : byId(box).replaceChildren("Nothing to draw.");
  byId("size-note").textContent = `${name}. Better: ${better}, and further left. Bars: 95 % intervals.`;
  draw("against-size", rows.filter((row) => row.size).map((row) => point(row, row.size, `${bytes(row.size)}, ${number(row.bits_per_weight, 3)} bits per weight`)), { xLabel: "size (on disk, else in memory)", xText: bytes });
  if (!byId("speed-note")) return;
  byId("speed-note").textContent = `${name}. Better: ${better}, and further right. One sequence at a time.`;
  draw("against-speed", rows.filter((row) => row.speed).map((row) => point(row, row.speed.speedup, `${number(row.speed.decode, 3)} tokens/s, ${row.speed.speedup.toFixed(2)} × dense`)), { xLabel: "speed of writing (1 = dense)", xText: (tick) => number(tick, 3), fromZero: false });
}

// key, title, linear axis
const STEPS = [
  ["h_cosine", "Hidden state: cosine", true], ["z_cosine", "Logits: cosine", true], ["p_cosine", "Probabilities: cosine", true],
  ["z_delta_rms", "Change of the logits: root mean square", false], ["uniform_variance", "Change of the logits: variance", false], ["kl_dense_pruned", "KL(dense‖copy), nats", false],
];

function steps() {
  const rows = shown.filter((row) => row.steps && !colors.hidden.has(row.name));
  for (const [key, title, linear] of STEPS) {
    const curves = rows.map((row) => ({ name: row.name, points: row.steps.step.map((step, index) => [step, row.steps[key][index], row.steps.prompts[index]]) }));
    const found = curves.flatMap((curve) => curve.points.map((point) => point[1])).filter((value) => value !== null);
    const xs = rows.flatMap((row) => row.steps.step), low = Math.min(...found);
    const y = linear && found.length ? [low - 0.04 * (1 - low || 1), 1] : undefined;
    lines(byId(`step-${key}`), curves, { y, linear, color: colors.color, xLabel: "step of decoding", xTicks: xs.length ? linearTicks(Math.min(...xs), Math.max(...xs)) : [], xText: String },
      ([step, value, prompts]) => `step ${step}: ${title} ${number(value)} (${prompts} prompts)`);
  }
}

function redraw() { charts(); steps(); }

function pairs() {
  const compared = (value, scale = 1) => {
    if (!value) return cell("–");
    const apart = value.low !== null && (value.low > 0 || value.high < 0);
    const text = number(scale * value.mean, 3);
    return node("td", {}, apart ? node("b", {}, text) : text, node("small", {}, interval(value, scale)));
  };
  const asked = data.pairs.some((pair) => pair.accuracy);
  const heads = ["first → second", "KL, nats", ...(asked ? ["accuracy, points", "gained, lost", "McNemar's p"] : []), "chrF"];
  const body = data.pairs.map((pair) => node("tr", {}, node("td", {}, `${pair.first} → ${pair.second}`), compared(pair.kl),
    ...(asked ? [compared(pair.accuracy, 100), cell(`${pair.accuracy.gained}, ${pair.accuracy.lost}`), cell(number(pair.accuracy.p, 2))] : []), compared(pair.chrf)));
  byId("pairs").append(node("thead", {}, node("tr", {}, ...heads.map((head) => node("th", {}, head)))), node("tbody", {}, ...body));
}

byId("title").textContent = data.title;
byId("remarks").append(...data.remarks.map((text) => node("li", {}, text)));
byId("quality").append(...QUALITIES.map(([key, name]) => node("option", { value: key }, name)));
byId("quality").addEventListener("change", charts);
if (!shown.some((row) => row.speed)) byId("speed-figure").remove();
if (!data.pairs.length) byId("pairs-section").remove();
ranking();
byId("steps").append(...STEPS.map(([key, title]) => node("figure", {}, node("h2", {}, title), node("div", { id: `step-${key}` }))));
legendOf(byId("legend"), shown, colors, redraw);
redraw();
pairs();
addEventListener("resize", redraw);
