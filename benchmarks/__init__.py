"""Benchmarks: what is measured, and how, is in `README.md`; what was measured is in `results/`."""
