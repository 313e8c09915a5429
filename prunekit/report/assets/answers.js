// ---- generated answers -----------------------------------------------------------------------

const written = { filter: "all", query: "" };

function fateOf(item) {
  if (item.dense.right !== item.pruned.right) return item.dense.right ? "lost" : "gained";
  return item.dense.given === item.pruned.given ? "same" : "moved";
}

function answerNode(item) {
  const fate = fateOf(item);
  const said = { same: "same answer", lost: "right → wrong", gained: "wrong → right", moved: item.dense.right ? "right, in other words" : "wrong → another wrong" }[fate];
  const table = node("table", {}, node("tr", {}, ...["", "answer", "text"].map((name) => node("th", { text: name }))));
  for (const side of ["dense", "pruned"]) table.append(node("tr", {}, node("th", { text: study.names[side] }),
    node("td", { text: `${item[side].right ? "✓ " : ""}${item[side].given ?? "none"}` }), node("td", { class: "what", text: item[side].text })));
  table.append(node("tr", {}, node("th", { text: "right" }), node("td", { text: item.right }), node("td")));
  return node("details", { class: `question ${fate}` }, node("summary", {}, item.question, node("small", { text: `${item.dense.given ?? "none"} → ${item.pruned.given ?? "none"} · ${said}` })), node("div", { class: "scroll" }, table));
}

function listAnswers() {
  const query = written.query.toLowerCase();
  const wanted = study.answers.filter((item) => (written.filter === "all" || (written.filter === "changed" ? fateOf(item) !== "same" : fateOf(item) === written.filter))
    && (!query || [item.question, item.dense.text, item.pruned.text].some((text) => text.toLowerCase().includes(query))));
  byId("answer-list").replaceChildren(...wanted.map(answerNode));
  if (!wanted.length) byId("answer-list").append(node("p", { class: "none", text: "No question matches." }));
}

function drawAnswers() {
  if (!study.answers.length) { byId("answers").hidden = byId("to-answers").hidden = true; return; }
  const count = (test) => study.answers.filter((item) => test(fateOf(item))).length;
  choose(byId("answer-filter"), [["all", `All ${study.answers.length}`], ["changed", `Changed ${count((fate) => fate !== "same")}`],
    ["lost", `Lost ${count((fate) => fate === "lost")}`], ["gained", `Gained ${count((fate) => fate === "gained")}`]], (value) => { written.filter = value; listAnswers(); });
  byId("answer-search").addEventListener("input", (event) => { written.query = event.target.value; listAnswers(); });
  listAnswers();
}
