"""The CPU benchmark: fastencoder beside other ways to run the same encoder. `python -m benchmarks.cpu`, `make bench`."""
