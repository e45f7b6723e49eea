"""The grid terms of ``varlen_attention`` against the attention of SAM as transformers computes it."""

from __future__ import annotations

import pytest
import torch
from kernel_testing import NATIVE, implementation
from varlen_attention_testing import offsets_of

from fastencoder.kernels import varlen_attention

HEADS, DIM = 3, 16


@pytest.mark.parametrize("name", ["reference", "cpu", *NATIVE])
@pytest.mark.parametrize("height, width, images", [(4, 7, 3), (7, 4, 1), (18, 17, 2)])
@torch.no_grad()
def test_sam(name, height, width, images):
    """The positions are multiplied by the query as it is, without the scale."""
    from transformers.models.sam import modeling_sam as sam

    config = sam.SamVisionConfig(hidden_size=HEADS * DIM, num_attention_heads=HEADS, use_rel_pos=True)
    module = sam.SamVisionAttention(config, window_size=1)
    module.rel_pos_h.data = torch.empty(2 * height - 1, DIM)
    module.rel_pos_w.data = torch.empty(2 * width - 1, DIM)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    module.proj = torch.nn.Identity()
    hidden = torch.randn(images, height, width, HEADS * DIM, dtype=torch.float64, generator=generator)
    expected = module(hidden)[0].reshape(-1, HEADS * DIM)

    q, k, v = module.qkv(hidden).view(-1, 3, HEADS, DIM).unbind(1)
    rows = module.get_rel_pos(height, height, module.rel_pos_h)  # [query's row, key's row, d]
    columns = module.get_rel_pos(width, width, module.rel_pos_w)
    grid = q.view(images, height, width, HEADS, DIM)
    rel_h = torch.einsum("byxhd,ykd->byxhk", grid, rows).flatten(0, 2)
    rel_w = torch.einsum("byxhd,xkd->byxhk", grid, columns).flatten(0, 2)
    offsets = offsets_of([height * width] * images, "cpu")
    with implementation(name):
        out = varlen_attention(q, k, v, offsets, height * width, DIM**-0.5, decomposed=(rel_h, rel_w))
    torch.testing.assert_close(out.flatten(1), expected, rtol=1e-5, atol=1e-5)  # its softmax is in float32
