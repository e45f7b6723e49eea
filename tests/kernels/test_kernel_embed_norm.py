"""``embed_norm`` against float64, with the error of float32 sums and one rounding as the bound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_testing import (
    ALL_IMPLEMENTATIONS,
    NATIVE,
    assert_within,
    device_of,
    implementation,
    random,
    rounding,
)

from fastencoder.kernels.embed_norm import embed_norm

TABLE_ROWS = {"token": 23, "position": 17, "type": 2}


def random_ids(seed: int, tokens: int, rows: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    ids = torch.randint(0, rows, (tokens,), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    ids[:2] = torch.tensor([0, rows - 1], dtype=dtype)[:tokens]  # the ends of every table
    return ids.to(device)


def arguments_of(tokens, dim, dtype, device, positions=True, types=True, bias=True, ids=torch.int64):
    """Arguments and keyword arguments of ``embed_norm``."""
    arguments = [random_ids(0, tokens, TABLE_ROWS["token"], ids, device)]
    arguments += [random(1, TABLE_ROWS["token"], dim, dtype=dtype, device=device)]
    arguments += [random(2, dim, dtype=dtype, device=device)]
    arguments += [random(3, dim, dtype=dtype, device=device) if bias else None, 1e-5]
    more = {}
    for seed, (name, present) in enumerate({"position": positions, "type": types}.items()):
        if present:
            more[f"{name}_ids"] = random_ids(4 + seed, tokens, TABLE_ROWS[name], ids, device)
            more[f"{name}_table"] = random(6 + seed, TABLE_ROWS[name], dim, dtype=dtype, device=device)
    return arguments, more


def check(name, arguments, more):
    with implementation(name):
        out = embed_norm(*arguments, **more)
    ids, table, weight, bias, eps = arguments
    assert out.dtype == table.dtype
    total = size = 0
    others = [which for which in ("type", "position") if f"{which}_ids" in more]
    for rows, of in [(ids, table), *((more[f"{which}_ids"], more[f"{which}_table"]) for which in others)]:
        row = of.double().cpu()[rows.long().cpu()]
        total, size = total + row, size + row.abs()
    weight, bias = weight.double().cpu(), 0 if bias is None else bias.double().cpu()
    centred = total - total.mean(-1, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    expected = centred / deviation * weight + bias
    single = torch.finfo(torch.float32).eps
    relative = size.amax(-1, keepdim=True) / deviation + 4 * (centred / deviation).abs()
    bound = 6 * single * (relative * weight.abs() + expected.abs()) + 1e-37
    if table.dtype != torch.float32:
        bound = bound + rounding(table.dtype) * expected.abs() + 1e-7
    assert_within(out, expected, bound)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 9),
    dim=st.sampled_from([8, 37, 72, 128, 384, 760]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    ids=st.sampled_from([torch.int32, torch.int64]),
    present=st.tuples(*[st.booleans()] * 3),
)
@example(tokens=0, dim=8, dtype=torch.float32, ids=torch.int64, present=(True, True, True))
@example(tokens=1, dim=37, dtype=torch.float16, ids=torch.int32, present=(False, False, False))
@example(tokens=7, dim=768, dtype=torch.bfloat16, ids=torch.int64, present=(True, True, True))
@example(tokens=7, dim=64, dtype=torch.float32, ids=torch.int64, present=(True, False, True))
@example(tokens=7, dim=64, dtype=torch.float32, ids=torch.int64, present=(False, True, True))
def test_optional_tables(name, tokens, dim, dtype, ids, present):
    check(name, *arguments_of(tokens, dim, dtype, device_of(name), *present, ids=ids))


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_the_sum_is_not_rounded(name):
    """In float16 2048 + x is a multiple of two: a norm of a rounded sum would be of another row."""
    arguments, more = arguments_of(9, 64, torch.float16, device_of(name))
    more["type_table"].fill_(2048.0)
    check(name, arguments, more)


@pytest.mark.parametrize("name", ALL_IMPLEMENTATIONS)
def test_strided_tables_and_ids(name):
    device = device_of(name)
    (ids, table, *rest), more = arguments_of(9, 72, torch.float32, device)
    wide = torch.full((TABLE_ROWS["token"], 90), float("nan"), device=device)
    wide[:, 7:79] = table
    more["position_table"] = more["position_table"].T.contiguous().T
    more["type_ids"] = more["type_ids"][:1].expand(9)
    check(name, [ids.repeat_interleave(2)[::2], wide[:, 7:79], *rest], more)


@pytest.mark.parametrize("dim", [72, 128, 384, 1030])
def test_rows_that_share_a_program(dim):
    from fastencoder.kernels._triton import DeviceLimits
    from fastencoder.kernels.add_norm.triton_rows import row_tile
    from fastencoder.kernels.embed_norm import triton_kernel

    limits = DeviceLimits((9, 0), 3)
    block_rows = row_tile(1 << 20, dim, 2, limits)[0]
    tokens = 6 * block_rows + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernel, "device_limits", lambda _: limits)
        assert row_tile(tokens, dim, 2, limits)[0] == block_rows > 1
        check("triton", *arguments_of(tokens, dim, torch.float16, device_of("triton")))


@pytest.mark.parametrize("which", ["token", "position", "type"])
@pytest.mark.parametrize("wrong", [-1, "rows", 2**31 - 1, -(2**31), 2**40])
def test_an_id_outside_of_its_table(which, wrong):
    """The row is NaN where nobody can raise, IndexError where somebody can; the other rows do not care."""
    arguments, more = arguments_of(7, 24, torch.float32, device_of("triton"))
    with implementation("triton"):
        expected = embed_norm(*arguments, **more)
    ids = arguments[0] if which == "token" else more[f"{which}_ids"]
    ids[3] = TABLE_ROWS[which] if wrong == "rows" else wrong
    with implementation("triton"):
        out = embed_norm(*arguments, **more)
    assert out[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(out[others], expected[others])
    with implementation("cpu"):
        _raises(arguments, more)


def _raises(arguments: list, more: dict[str, torch.Tensor]) -> None:
    arguments = [x.cpu() if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises(IndexError):
        embed_norm(*arguments, **{name: x.cpu() for name, x in more.items()})


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("which", ["token", "position", "type"])
@pytest.mark.parametrize("wrong", [-1, "rows", 2**31 - 1, -(2**31), 2**40])
def test_the_extension_reads_nothing_outside_of_a_table(name, which, wrong):
    arguments, more = arguments_of(7, 24, torch.float32, "cpu")
    ids = arguments[0] if which == "token" else more[f"{which}_ids"]
    ids[3] = TABLE_ROWS[which] if wrong == "rows" else wrong
    with implementation(name):
        _raises(arguments, more)


def test_it_is_what_bert_computes():
    """Bit for bit in float32, by the model's own embeddings, where PyTorch's operations run."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = BertConfig(vocab_size=50, hidden_size=32, max_position_embeddings=20, type_vocab_size=2)
    module = BertEmbeddings(config).eval()
    with torch.no_grad():
        module.LayerNorm.weight.normal_()
        module.LayerNorm.bias.normal_()
        ids, types = torch.randint(0, 50, (3, 9)), torch.randint(0, 2, (3, 9))
        expected = module(input_ids=ids, token_type_ids=types)
        with implementation("cpu"):
            out = embed_norm(
                ids.flatten(),
                module.word_embeddings.weight,
                module.LayerNorm.weight,
                module.LayerNorm.bias,
                module.LayerNorm.eps,
                position_ids=torch.arange(9).repeat(3),
                position_table=module.position_embeddings.weight,
                type_ids=types.flatten(),
                type_table=module.token_type_embeddings.weight,
            )
    assert torch.equal(out.view(3, 9, 32), expected)


def test_float64_is_not_for_the_kernel():
    arguments, more = arguments_of(5, 8, torch.float64, "cpu")
    total = sum(F.embedding(more[f"{n}_ids"], more[f"{n}_table"]) for n in ("type", "position"))
    expected = F.layer_norm(total + F.embedding(*arguments[:2]), (8,), *arguments[2:])
    for name in ("reference", "cpu", "triton"):
        with implementation(name):
            torch.testing.assert_close(embed_norm(*arguments, **more), expected, rtol=1e-13, atol=1e-13)


def test_wrong_arguments():
    (ids, table, weight, bias, eps), more = arguments_of(5, 8, torch.float32, "cpu")
    for name in more:
        with pytest.raises(ValueError, match=f"{name.split('_')[0]}_ids and .* together"):
            embed_norm(ids, table, weight, bias, eps, **{k: v for k, v in more.items() if k != name})
    for wrong in (ids[:4], ids.float(), ids[None]):
        with pytest.raises(ValueError, match="position_ids must be int32 or int64"):
            embed_norm(ids, table, weight, bias, eps, position_ids=wrong, position_table=table)
    for wrong in (table[:, :7], table.half(), table[0]):
        with pytest.raises(ValueError, match="type_table must be"):
            embed_norm(ids, table, weight, bias, eps, type_ids=ids, type_table=wrong)
    with pytest.raises(ValueError, match="weight must be"):
        embed_norm(ids, table, weight[:7], bias, eps)
    with pytest.raises(ValueError, match="bias must be"):
        embed_norm(ids, table, weight, bias[:7], eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    arguments, more = arguments_of(5, 8, dtype, "cpu")
    torch.library.opcheck(torch.ops.fastencoder.embed_norm.default, arguments, more)
    arguments[3] = None
    torch.library.opcheck(torch.ops.fastencoder.embed_norm.default, arguments)
