"""Save a study: JSON, CSV, PNG figures and one self-contained HTML page."""

from prunekit.report.writer import load, save

__all__ = ["load", "save"]
