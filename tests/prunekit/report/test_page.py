"""The HTML page: one file, safe whatever texts hold, and what a browser draws."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from made_studies import EVIL, PROMPTS, STEPS, make_study

from prunekit.report import (
    contents,
    page,
)


def page_parts(folder: Path) -> tuple[str, str]:
    """The page without its data, and the data's JSON."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    match = re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.S)
    assert match is not None
    return text.replace(match[1], ""), match[1]


def test_page_is_one_small_file_that_loads_nothing(folder):
    frame, data = page_parts(folder)
    assert len(frame) + len(data) < 2_000_000
    assert "http:" not in frame and "https:" not in frame and "//cdn" not in frame
    assert not re.search(r"<link|<img|<iframe|@import|url\(|\bsrc=|fetch\(|XMLHttp", frame)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', frame))
    assert "Content-Security-Policy" in frame and "default-src 'none'" in frame
    assert 'name="viewport"' in frame and 'data-theme="dark"' in frame


def test_page_data_is_safe_and_complete(study, folder):
    frame, data = page_parts(folder)
    assert frame.count("</script>") == frame.count("<script") == 3
    assert not set("<>&\u2028\u2029") & set(data)
    found = json.loads(data, parse_constant=lambda name: pytest.fail(name))
    assert found == json.loads(json.dumps(contents.payload(study)).replace(r"\ud800", r"\ufffd"))
    tokens = [item["dense"][3] for item in found["generations"][: len(EVIL)]]
    assert tokens == [text.replace("\ud800", "\ufffd") for text in EVIL]
    assert "Dense &lt;one&gt; → Pruned &amp; two" in frame
    first = found["generations"][1]
    assert first["divergence"] == 1 and len(first["kl"]) == len(first["top"]) == STEPS
    assert first["top"][0][1][0] == [" t4", 0.1]
    shown = [figure["key"] for figure in found["figures"]]
    assert shown == [
        path.stem
        for path in sorted((folder / "figures").iterdir(), key=lambda p: shown.index(p.stem))
    ]


def test_page_curves_equal_the_grid(study, folder):
    found = json.loads(page_parts(folder)[1])
    charts_of = {chart["key"]: chart for figure in found["figures"] for chart in figure["charts"]}
    chart = charts_of["stepwise-kl"]
    series = {one["name"]: one for one in chart["series"]}
    expected = study.decoding.teacher_forced.interval("kl_dense_pruned", ("step",))
    for end in ("mean", "low", "high"):
        assert series["KL(dense‖pruned)"][end] == pytest.approx(getattr(expected, end), rel=1e-4)
    valid = study.decoding.teacher_forced.mean("estimate_valid", ("step",))
    assert series["estimate"]["valid"] == pytest.approx(valid, abs=1e-4)
    assert series["estimate"]["dashed"] and not series["estimate"]["low"]
    assert (
        charts_of["layerwise-attn"]["marks"] == [7, 9] and not charts_of["layerwise-mlp"]["marks"]
    )
    counts = charts_of["first-divergence"]["series"][0]
    steps = [g.first_divergence for g in study.decoding.generations]
    assert sum(counts["mean"]) == sum(step is not None for step in steps)
    assert f"{steps.count(None)} of {PROMPTS}" in charts_of["first-divergence"]["note"]


def drawn_by_a_browser(html: Path, profile: Path, *, whole: bool = False) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    quiet = "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    done = subprocess.run(
        ["chromium", *flags.split(), *quiet.split(), f"--user-data-dir={profile}",
         f"file://{html}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout if whole else done.stdout.partition('id="study"')[0]


needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed"
)


@needs_chromium
def test_a_browser_draws_the_page(folder, tmp_path):
    drawn = drawn_by_a_browser(folder / "index.html", tmp_path / "profile")
    assert drawn.count("<path") > 50 and "hidden state h" in drawn
    assert drawn.count('data-step="') == 2 * STEPS
    assert "Prompt 0: &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
    assert "<script>alert" not in drawn
    small = tmp_path / "small.html"
    small.write_text(page.render(contents.payload(make_study(0.001))), encoding="utf-8")
    drawn = drawn_by_a_browser(small, tmp_path / "profile")
    assert ">5·10⁻⁴<" in drawn and "10^" not in drawn  # short enough for the ticks' margin


# What a person does, as events, and what the page then shows; the answers go into an attribute.
ACTS = """
const said = {};
const tipText = () => tip.hidden ? null : tip.textContent;
const send = (target, type, pointerType) => {
  const { left, top, width, height } = target.getBoundingClientRect();
  const at = { clientX: left + width / 2, clientY: top + height / 2, bubbles: true, pointerType };
  target.dispatchEvent(new PointerEvent(type, at));
};
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const tap = (target) => {
  send(target, "pointerdown", "touch");
  send(target, "pointerleave", "touch");
};
const curve = document.querySelector("#chart-stepwise-kl svg");
const bar = document.querySelector("#chart-options-loglik svg rect[fill=transparent]");
const token = document.querySelector('#dense-tokens [data-step="2"]');
for (const [name, target] of Object.entries({ curve, bar, token })) {
  tap(target);
  said[`tap ${name}`] = tipText();
  tap(document.querySelector("h1"));
  said[`away from ${name}`] = tipText();
  send(target, "pointermove", "mouse");
  said[`mouse on ${name}`] = tipText();
  send(name === "token" ? target.parentNode : target, "pointerleave", "mouse");
  said[`mouse off ${name}`] = tipText();
}
said.inOrder = [...document.querySelectorAll(".tokens [tabindex='0']")].length;
document.querySelector("#dense-tokens [tabindex='0']").focus();
press("ArrowRight");
press("ArrowRight");
said.step = document.activeElement.dataset.step;
said["key on token"] = tipText();
dispatchEvent(new Event("scroll"));
said["after a scroll"] = tipText();
press("End");
said.end = document.activeElement.dataset.step;
document.activeElement.blur();
said["blurred"] = tipText();
document.querySelector("#chart-options-loglik svg").focus();
press("ArrowDown");
said["key on bar"] = tipText();
const all = (selector, of) => [...document.querySelectorAll(selector)].map(of);
said.labels = all("svg[role=img]", (one) => one.getAttribute("aria-label"));
said.names = all("#chart-options-loglik svg text[text-anchor=end]", (one) => one.firstChild.data);
const filter = byId("question-filter").children;
said.filters = [...filter].map((one) => one.textContent);
said.listed = [...filter].map((one) => {
  one.click();
  return document.querySelectorAll("#question-list .question").length;
});
filter[2].click();
said.lost = document.querySelector("#question-list .question").textContent;
document.body.setAttribute("data-said", JSON.stringify(said));
"""


@needs_chromium
def test_taps_keys_and_filters_show_what_pointers_show(study, tmp_path):
    alike = "What all of the options of this question begin with, namely that water "
    endings = ("boils", "freezes", "stays", "turns to gold")
    items = list(study.subspace.items)
    items[0] = dataclasses.replace(items[0], options=tuple(alike + end for end in endings))
    lost = (-1.0, -2.0, -3.0, -4.0)
    items[3] = dataclasses.replace(items[3], logprobs_dense=lost[1::-1] + lost[2:])
    items[3] = dataclasses.replace(items[3], question="Lost?", logprobs_pruned=lost)
    asked = dataclasses.replace(study.subspace, items=tuple(items))
    html = page.render(contents.payload(dataclasses.replace(study, subspace=asked)))
    file = tmp_path / "acted.html"
    file.write_text(html.replace("</body>", f"<script>{ACTS}</script></body>"), encoding="utf-8")
    drawn = drawn_by_a_browser(file, tmp_path / "profile", whole=True)
    said = json.loads(unescape(re.search(r'<body data-said="([^"]*)"', drawn)[1]))
    for name in ("curve", "bar", "token"):
        assert said[f"tap {name}"] and said[f"tap {name}"] == said[f"mouse on {name}"]
        assert said[f"away from {name}"] is None and said[f"mouse off {name}"] is None
    assert said["inOrder"] == 2  # one token of each text; the arrows reach the others
    assert (said["step"], said["end"]) == ("2", str(STEPS - 1))
    assert said["key on token"] == said["tap token"] == said["after a scroll"]
    assert said["blurred"] is None and said["key on bar"] == said["tap bar"]
    assert said["labels"] and not [
        text for text in said["labels"] if re.search(" by [.]|: by", text)
    ]
    assert [name.rpartition("…")[2] for name in said["names"][:4]] == list(endings)
    changed = sum(
        max(range(4), key=one.logprobs_dense.__getitem__)
        != max(range(4), key=one.logprobs_pruned.__getitem__)
        for one in items
    )
    assert said["filters"][:3] == [f"All {len(items)}", f"Changed {changed}", "Lost 1"]
    assert said["listed"][:3] == [len(items), changed, 1]
    assert said["lost"].startswith("Lost?B → A · right → wrong")


def test_print_keeps_titles_with_their_charts(folder):
    rules = page_parts(folder)[0].partition("@media print")[2]
    assert re.search(r"h3.*\.titled.*\{ break-after: avoid", rules)
    assert re.search(r"\.chart.*\{ break-inside: avoid", rules)
