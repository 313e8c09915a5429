"""What docstrings and pages cite is in the repository: files, and headings of pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOPS = ("", "docs/", "bench/", "kernels/**/", "prunekit/**/", "tests/**/")
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for top in TOPS
    for kind in ("*.md", "*.py", "*.sh")
    for path in ROOT.glob(top + kind)
    if path.name != "CHANGELOG.md"  # tells of files that were
}


def headings(page: Path) -> set[str]:
    lines = page.read_text(encoding="utf-8").splitlines()
    return {line.lstrip("# ").strip() for line in lines if line.startswith("#")}


def test_cited_pages_and_their_headings_exist() -> None:
    cited = 0
    for path, text in TEXTS.items():
        flat = re.sub(r"\s+#?\s*", " ", text)  # citations go over ends of lines
        for page, heading in re.findall(r"\bdocs/(\w+\.md)(?:, \"([^\"]+)\")?", flat):
            cited += bool(heading)
            assert (ROOT / "docs" / page).is_file(), f"{path} cites docs/{page}"
            if heading:
                known = headings(ROOT / "docs" / page)
                assert heading in known, f"{path} cites {heading!r} of docs/{page}"
    assert cited >= 3


def test_cited_source_files_exist() -> None:
    for path, text in TEXTS.items():
        pattern = r"`((?:bench|docs|kernels|prunekit|tests)/[\w/]+\.(?:py|md|sh|csv))`"
        for name in re.findall(pattern, text):
            assert (ROOT / name).is_file(), f"{path} cites {name}"


def test_no_page_is_cited_that_only_its_author_has() -> None:
    for path, text in TEXTS.items():
        cited = re.search(r"\((METRICS|SPARSE|PRUNING|STYLE|DESIGN)(: |, \")", text)
        assert cited is None, f"{path} cites {cited}"
