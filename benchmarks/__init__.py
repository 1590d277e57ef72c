"""Measurements of speed, memory and quality. Run a module from the repository root: `python -m benchmarks.NAME --help`."""
