"""Benchmarks and their tables. Run a module from the repository's root: `python -m bench.NAME`."""
