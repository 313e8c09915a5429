"""Outputs on disk: written whole or not at all, by one run at a time."""
