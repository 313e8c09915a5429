"""`Study`: what pruning did to a model, to look at, save and load.

It stands above the analyses, whose findings it holds, and the report, which writes them down.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunekit import report
from prunekit.analysis.findings import Findings
from prunekit.process import distributed


@dataclass(frozen=True)
class Study(Findings):
    """The findings of `compare`, to be saved as a folder and loaded from it."""

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write JSON, CSV, figures and one self-contained HTML page; see `prunekit.report`.

        Under several processes only the main one writes.

        Args:
            folder: Where to; its parents are created.
            overwrite: Whether to replace a study that is there.

        Returns:
            The folder.

        Raises:
            PrunekitError: The folder is not empty, holds something that is no study, or can't be
                written.
        """
        if distributed.is_main():
            report.save(self, folder, overwrite=overwrite)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Read back the study that `save` wrote into `folder`.

        Raises:
            PrunekitError: There is none, or another version of prunekit wrote it.
        """
        return cls.from_dict(report.read(folder))
