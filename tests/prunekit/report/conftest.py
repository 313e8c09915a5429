"""One study, and the folder that it is saved in."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_studies import make_study

from prunekit import report
from prunekit.study.study import Study


@pytest.fixture(scope="session")
def study() -> Study:
    return make_study()


@pytest.fixture(scope="session")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("report") / "deep" / "study"
    assert report.save(study, target) == target / "index.html"
    return target
