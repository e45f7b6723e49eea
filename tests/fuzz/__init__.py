"""Differential fuzzing: random architectures, masks, dtypes and entry points against the stock models, and kernels against
their references. `test_fuzz.py` is the short run of every test; `python -m tests.fuzz` is the long one."""
