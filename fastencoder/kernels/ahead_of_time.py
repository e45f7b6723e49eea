"""Moved: `machine_code` compiles one launch, `fastencoder.runtime.inspect_kernels` all of them."""

from fastencoder.kernels.machine_code import Resources, compile_launch, limits_of

__all__ = ["Resources", "compile_launch", "limits_of"]

if __name__ == "__main__":
    from fastencoder.runtime.inspect_kernels import main

    raise SystemExit(main())
