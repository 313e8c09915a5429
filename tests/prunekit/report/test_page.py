"""The HTML page: one file, safe whatever texts hold, and what a browser draws."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
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


def drawn_by_a_browser(html: Path, profile: Path) -> str:
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    quiet = "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    done = subprocess.run(
        ["chromium", *flags.split(), *quiet.split(), f"--user-data-dir={profile}",
         f"file://{html}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout.partition('id="study"')[0]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
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
