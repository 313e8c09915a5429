// ---- questions -------------------------------------------------------------------------------

const asked = { filter: "all", query: "" };
const best = (values) => values.reduce((most, value, index) => value > values[most] ? index : most, 0);
const letter = (index) => String.fromCharCode(65 + index);

function changeOf(item) {
  const [dense, pruned] = [best(item.dense), best(item.pruned)];
  if (dense === pruned) return "same";
  return pruned === item.answer ? "gained" : dense === item.answer ? "lost" : "moved";
}

// exp of log-probabilities, shared out among the options
function shares(values) {
  const most = Math.max(...values);
  const masses = values.map((value) => Math.exp(value - most));
  const total = masses.reduce((sum, mass) => sum + mass, 0);
  return masses.map((mass) => mass / total);
}

function questionNode(item) {
  const sides = ["dense", "pruned"], chosen = sides.map((side) => best(item[side]));
  const among = sides.map((side) => shares(item[side]));
  const table = node("table", {}, node("tr", {}, node("th", { text: "option" }), ...sides.map((side) => node("th", { text: study.names[side] }))));
  item.options.forEach((option, index) => {
    const cells = sides.map((side, which) => node("td", { class: chosen[which] === index ? "num chosen" : "num" }, percent(among[which][index]), node("small", { text: ` ${number(item[side][index])} nats` })));
    table.append(node("tr", {}, node("td", { text: `${index === item.answer ? "✓ " : ""}${letter(index)}. ${option}` }), ...cells));
  });
  const said = { same: "same answer", lost: "right → wrong", gained: "wrong → right", moved: "wrong → another wrong" }[changeOf(item)];
  const answers = `${letter(chosen[0])} → ${letter(chosen[1])}`;
  return node("details", { class: `question ${changeOf(item)}` }, node("summary", {}, item.question, node("small", { text: `${answers} · ${said}` })), node("div", { class: "scroll" }, table));
}

function listQuestions() {
  const query = asked.query.toLowerCase();
  const wanted = study.questions.filter((item) => (asked.filter === "all" || (asked.filter === "changed" ? changeOf(item) !== "same" : changeOf(item) === asked.filter))
    && (!query || [item.question, ...item.options].some((text) => text.toLowerCase().includes(query))));
  byId("question-list").replaceChildren(...wanted.map(questionNode));
  if (!wanted.length) byId("question-list").append(node("p", { class: "none", text: "No question matches." }));
}

function drawQuestions() {
  if (!study.questions.length) { byId("questions").hidden = byId("to-questions").hidden = true; return; }
  const count = (test) => study.questions.filter((item) => test(changeOf(item))).length;
  choose(byId("question-filter"), [["all", `All ${study.questions.length}`], ["changed", `Changed ${count((change) => change !== "same")}`],
    ["lost", `Lost ${count((change) => change === "lost")}`], ["gained", `Gained ${count((change) => change === "gained")}`]], (value) => { asked.filter = value; listQuestions(); });
  byId("question-search").addEventListener("input", (event) => { asked.query = event.target.value; listQuestions(); });
  listQuestions();
}

drawSummary();
drawFigures();
drawQuestions();
drawAnswers();
drawReader();
