"""The comparison of two models, and what it writes."""

from prunekit.study.study import Study

__all__ = ["Study"]
