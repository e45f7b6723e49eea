"""Builds the optional C++ extension; everything else is in pyproject.toml. Where it cannot be built, the installation goes
on without, and the same operations run in plain PyTorch."""

import platform
from pathlib import Path

from setuptools import Extension, setup

native = Extension(
    "fastencoder._native",
    sources=[f"fastencoder/native/{name}.cpp" for name in ("module", "unchanged", "tasks", "avx2", "avx512", "avx512_vnni")],
    depends=sorted(map(str, Path("fastencoder/native").glob("*.[hi]*"))),
    # No -ffast-math: NaN and infinity have to come out where they go in.
    # The warning is about g++'s own headers of intrinsics.
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"),
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ],
    extra_link_args=["-fopenmp"],
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[native] if platform.machine() in ("x86_64", "AMD64") else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
