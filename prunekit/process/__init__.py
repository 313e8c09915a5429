"""The process that prunekit works in: others beside it, torch's settings, progress bars."""
