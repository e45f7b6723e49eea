"""Every configuration that ``heuristics.py`` can choose, as launches on tensors without storage, to be compiled ahead of time.

``make kernels`` compiles them for every compute capability and reads registers, spills, shared memory and matrix
instructions from the machine code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastencoder.kernels._triton import DeviceLimits, Launch, user_precision
from fastencoder.kernels.varlen_attention.features import PLAIN, Features
from fastencoder.kernels.varlen_attention.triton_kernel import plan

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
_SEQUENCES = 64
_HEADS = 12

# dtype, head dimension, longest sequence
_PLAIN = [("bf16", 64, seqlen) for seqlen in (16, 32, 64, 128, 256, 512)]
_PLAIN += [("bf16", dim, seqlen) for dim in (32, 80, 128) for seqlen in (128, 256, 512)]
_PLAIN += [("bf16", 16, seqlen) for seqlen in (128, 256, 512)] + [("bf16", 128, 64), ("bf16", 256, 512)]
_PLAIN += [("fp16", 64, 128), ("fp16", 256, 512)]
_PLAIN += [("tf32", dim, 512) for dim in (32, 64, 128, 256)] + [("tf32", 32, 128), ("tf32", 64, 128)]
_PLAIN += [("fp32", dim, 512) for dim in (32, 64, 128, 256)]

# The features that change the code, in the combinations that families of models have.
_FEATURES = {
    "rope": ("rope",),
    "interleaved": ("interleaved",),
    "window-rope": ("window", "rope"),
    "softcap-window-rope": ("softcap", "window", "rope"),
    "relative": ("relative",),
    "bias": ("bias",),
    "disentangled": ("c2p", "p2c"),
    "c2p": ("c2p",),
    "p2c": ("p2c",),
    "decomposed": ("decomposed",),
}
_WITH_FEATURES = [("bf16", 64, seqlen, name) for name in _FEATURES for seqlen in (64, 512)]
_WITH_FEATURES += [("bf16", 64, seqlen, "disentangled") for seqlen in (32, 256)] + [("fp16", 64, 256, "disentangled")]
_WITH_FEATURES += [("bf16", 64, 256, "decomposed"), ("bf16", 80, 256, "decomposed"), ("bf16", 80, 4096, "decomposed")]
_WITH_FEATURES += [(dtype, 64, 512, name) for dtype in ("tf32", "fp32") for name in ("disentangled", "decomposed")]
_WITH_FEATURES += [("bf16", 64, 256, "softcap-window-rope"), ("bf16", 64, 256, "bias")]
_WITH_FEATURES += [("bf16", 128, 256, "softcap-window-rope"), ("bf16", 128, 256, "bias")]
_WITH_FEATURES += [("bf16", 128, 512, "softcap-window-rope"), ("bf16", 128, 512, "bias")]
_WITH_FEATURES += [("bf16", 256, 512, "softcap-window-rope"), ("bf16", 256, 512, "relative")]
_WITH_FEATURES += [("tf32", 64, 512, "softcap-window-rope"), ("fp32", 64, 512, "softcap-window-rope")]


def configurations(limits: DeviceLimits) -> Iterator[tuple[str, Launch]]:
    """Name and launch of every configuration on a device with these limits."""
    for dtype, dim, seqlen in _PLAIN:
        yield f"varlen_attention-{dtype}-d{dim}-s{seqlen}", _launch(limits, dtype, dim, seqlen, ())
    for dtype, dim, seqlen, name in _WITH_FEATURES:
        yield f"varlen_attention-{dtype}-d{dim}-s{seqlen}-{name}", _launch(limits, dtype, dim, seqlen, _FEATURES[name])
    yield "varlen_attention-bf16-d64-s512-tiles", _launch(limits, "bf16", 64, 512, (), with_tiles=True)


def _launch(
    limits: DeviceLimits, dtype: str, dim: int, seqlen: int, features: tuple[str, ...], with_tiles: bool = False
) -> Launch:
    tokens = _SEQUENCES * seqlen
    q, k, v = _meta(tokens, 3, _HEADS, dim, dtype=_DTYPES[dtype]).unbind(1)
    offsets = _meta(_SEQUENCES + 1, dtype=torch.int32)
    tiles = _meta(4 * _SEQUENCES, 2, dtype=torch.int32) if with_tiles else None
    out = _meta(tokens, _HEADS, dim, dtype=q.dtype)
    with user_precision(dtype):
        return plan(q, k, v, offsets, seqlen, dim**-0.5, out, limits, _features(q, seqlen, features), tiles)


def _features(q: torch.Tensor, seqlen: int, names: tuple[str, ...]) -> Features:
    tokens, heads, dim = q.shape
    features = PLAIN
    if "window" in names:
        features = features._replace(left=64, right=64)
    if "softcap" in names:
        features = features._replace(softcap=50.0)
    if "rope" in names or "interleaved" in names:
        table = _meta(tokens, dim // 2, dtype=torch.float32)
        features = features._replace(cos=table, sin=table, interleaved="interleaved" in names)
    if "relative" in names:
        features = features._replace(relative_bias=_meta(heads, 2 * 128 - 1, dtype=torch.float32))
    if "bias" in names:
        features = features._replace(bias=_meta(1, heads, seqlen, seqlen, dtype=q.dtype))
    if "decomposed" in names:
        rel_h, rel_w = (_meta(heads, tokens, 64, dtype=q.dtype).transpose(0, 1) for _ in range(2))
        features = features._replace(rel_h=rel_h, rel_w=rel_w)
    if "c2p" in names or "p2c" in names:
        products = {name: _meta(heads, tokens, 512, dtype=q.dtype).transpose(0, 1) for name in names}
        features = features._replace(columns=_meta(2 * seqlen - 1, dtype=torch.int32), **products)
    return features


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
