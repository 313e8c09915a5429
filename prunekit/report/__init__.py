"""Save a study: JSON, CSV, PNG figures and one self-contained HTML page."""

from prunekit.report.writer import read, save

__all__ = ["read", "save"]
