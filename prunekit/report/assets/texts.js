// ---- texts -----------------------------------------------------------------------------------

// From nothing at 0.001 nats to full at 10, by powers of ten.
const shadeOf = (kl) => kl === null || kl === undefined || kl <= 1e-3 ? 0 : 0.65 * Math.min(1, (Math.log10(kl) + 3) / 4) ** 1.7;
const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍");
const reading = { item: null, filter: "all", query: "" };

function tokenNodes(item, side) {
  const tokens = item[side], split = item.divergence;
  const made = tokens.map((token, step) => {
    const comparable = side === "dense" || split === null || step <= split;
    const classes = [split === null || step < split ? "same" : "", step === split ? "first" : ""].filter(Boolean).join(" ");
    const span = node("span", { class: classes, "data-step": step, role: "option", tabindex: step ? -1 : 0, "aria-describedby": "tip", style: comparable ? `background:rgba(var(--mark),${shadeOf(item.kl[step]).toFixed(3)})` : "" });
    token.split(/(\n)/).forEach((part) => span.append(part === "\n" ? node("i", { class: "glyph", text: "⏎" }) : "", part));
    return span;
  });
  if (split === tokens.length) made.push(node("span", { class: "first end", text: " ends here " }));
  return made;
}

function tokenTip(item, side, step) {
  const content = node("div");
  if (side === "pruned" && item.divergence !== null && step > item.divergence) {
    content.append(node("b", { text: `step ${step}` }), node("div", { text: "After the first difference the two models continue different texts: their distributions are not comparable token by token." }));
    return content;
  }
  const facts = [`step ${step}`, `KL ${number(item.kl[step])} nats`];
  if (item.cosine[step] !== undefined) facts.push(`cosine p ${number(item.cosine[step])}`);
  content.append(node("b", { text: facts.join(" · ") }));
  if (side === "dense" && item.divergence !== null && step > item.divergence) content.append(node("div", { text: "(both models on the dense text)" }));
  const [dense, pruned] = item.top[step] ?? [[], []];
  if (dense.length) {
    const table = node("table", {}, node("tr", {}, node("th", { text: study.names.dense, colspan: "2" }), node("th", { text: study.names.pruned, colspan: "2" })));
    for (let rank = 0; rank < dense.length; rank++) {
      const cells = [dense[rank], pruned[rank]].flatMap((entry) => entry ? [node("td", {}, node("code", { text: visible(entry[0]) })), node("td", { text: percent(entry[1]) })] : [node("td"), node("td")]);
      table.append(node("tr", {}, ...cells));
    }
    content.append(table);
  }
  return content;
}

const percent = (share) => share === null ? "–" : share >= 0.0995 ? `${(100 * share).toFixed(1)} %` : `${(100 * share).toPrecision(2)} %`;

function unmark() {
  for (const marked of document.querySelectorAll(".tokens .hit")) marked.classList.remove("hit");
}

// One token of a text is in the order of Tab; arrows, Home and End go from it to the others.
function walk(host, event) {
  const tokens = [...host.querySelectorAll("[data-step]")];
  const now = tokens.indexOf(document.activeElement);
  const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (now < 0 || next === undefined) return;
  event.preventDefault();
  if (!tokens[next]) return;
  tokens[now].tabIndex = -1;
  tokens[next].tabIndex = 0;
  tokens[next].focus();
}

function showItem(item) {
  reading.item = item;
  byId("prompt-text").textContent = item.prompt;
  byId("dense-tokens").replaceChildren(...tokenNodes(item, "dense"));
  byId("pruned-tokens").replaceChildren(...tokenNodes(item, "pruned"));
  byId("measures").replaceChildren(...item.measures.map(([name, value]) => node("div", {}, node("dt", { text: name }), node("dd", { text: typeof value === "string" ? value : number(value) }))));
  listPrompts();
}

function listPrompts() {
  const query = reading.query.toLowerCase();
  const wanted = study.generations.filter((item) => (reading.filter === "all" || (reading.filter === "same") === (item.divergence === null))
    && (!query || [item.prompt, item.dense.join(""), item.pruned.join("")].some((text) => text.toLowerCase().includes(query))));
  byId("prompts").replaceChildren(...wanted.map((item) => {
    const label = item.divergence === null ? "identical" : `differs from step ${item.divergence}`;
    return node("li", {}, node("button", { type: "button", "aria-current": String(item === reading.item), onclick: () => showItem(item) },
      middle(item.prompt, 90), node("small", { text: label })));
  }));
  if (!wanted.length) byId("prompts").append(node("li", { class: "none", text: "No prompt matches." }));
}

function drawReader() {
  if (!study.generations.length) { byId("texts").hidden = byId("to-texts").hidden = true; return; }
  byId("texts-lead").textContent = study.texts_lead;
  byId("dense-name").append(study.names.dense);
  byId("pruned-name").append(study.names.pruned);
  choose(byId("filter"), [["all", "All"], ["different", "Different"], ["same", "Identical"]], (value) => { reading.filter = value; listPrompts(); });
  byId("search").addEventListener("input", (event) => { reading.query = event.target.value; listPrompts(); });
  byId("shade-legend").append(node("span", {}, "KL(dense‖pruned) per token: ≤ 0.001", node("span", { class: "ramp" }), "≥ 10 nats"),
    node("span", { text: "grey: the same tokens in both" }), node("span", {}, node("span", { class: "box", text: "first difference" })));
  for (const side of ["dense", "pruned"]) {
    const host = byId(`${side}-tokens`);
    host.setAttribute("aria-label", `Tokens of ${study.names[side]}. Arrow keys go from one to the next.`);
    const show = (span, x, y, place) => {
      unmark();
      const step = Number(span.dataset.step);
      const both = reading.item.divergence === null || step <= reading.item.divergence;
      for (const other of both ? ["dense", "pruned"] : [side]) byId(`${other}-tokens`).querySelector(`[data-step="${step}"]`)?.classList.add("hit");
      showTip(tokenTip(reading.item, side, step), x, y, { gone: unmark, place });
    };
    tips(host, (event) => {
      const span = event.target.closest?.("[data-step]");
      if (span) show(span, event.clientX, event.clientY); else hideTip();
    });
    host.addEventListener("focusin", (event) => {
      const span = event.target;
      if (!span.matches("[data-step]:focus-visible")) return;
      const place = () => { const box = span.getBoundingClientRect(); return [box.left, box.bottom - 10]; };
      show(span, ...place(), place);
    });
    host.addEventListener("focusout", hideTip);
    host.addEventListener("keydown", (event) => walk(host, event));
  }
  showItem(study.generations.find((item) => item.divergence !== null) ?? study.generations[0]);
}
