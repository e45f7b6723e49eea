"""A real server under real load: what `python -m tools.soak` (`make soak`) does, in parts that the tests use as well."""
