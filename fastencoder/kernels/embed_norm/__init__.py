"""``embed_norm``: token, type and position embeddings, their sum, and LayerNorm."""

from __future__ import annotations

import torch

from fastencoder.kernels._dispatch import Dispatcher, register

__all__ = ["embed_norm"]

_embed_norm = Dispatcher(__name__, "embed_norm")


def embed_norm(
    ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    position_ids: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    type_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """``LayerNorm(table[ids] + type_table[type_ids] + position_table[position_ids]) * weight + bias`` (Devlin et al.
    2019, arXiv 1810.04805; LayerNorm of Ba et al. 2016, arXiv 1607.06450).

    The sum and its statistics are float32, and the result is rounded once. The models' own code adds in this order, too, but
    rounds to the tables' dtype after each addition and before the norm: in float32 there is no such rounding, and in 16
    bit this result is nearer to the float32 model.

    Args:
        ids: int32 or int64 ``[T]``, of packed tokens or of a flattened padded batch.
        table: ``[V, D]``.
        weight: ``[D]``.
        bias: ``[D]`` or None.
        eps: added to the variance.
        position_ids, position_table: int32 or int64 ``[T]``, and ``[M, D]`` of the dtype of ``table``. Both or neither.
        type_ids, type_table: int32 or int64 ``[T]``, and ``[N, D]`` of the dtype of ``table``. Both or neither.

    Returns:
        ``[T, D]`` in the dtype of ``table``. On a GPU the row of a token with an id outside of its table is NaN: nothing is
        read there, and nobody waits to find out.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        IndexError: on the CPU, an id outside of its table.
    """
    if torch.compiler.is_compiling():
        return torch.ops.fastencoder.embed_norm(
            ids, table, weight, bias, eps,
            position_ids=position_ids, position_table=position_table, type_ids=type_ids, type_table=type_table,
        )  # fmt: skip
    return _run(
        ids, table, weight, bias, eps,
        position_ids=position_ids, position_table=position_table, type_ids=type_ids, type_table=type_table,
    )  # fmt: skip


def _run(
    ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    position_ids: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    type_table: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(ids, table, weight, bias, position_ids, position_table, type_ids, type_table)
    return _embed_norm(ids, table, weight, bias, eps, position_ids, position_table, type_ids, type_table)


def _fake(
    ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    position_ids: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    type_ids: torch.Tensor | None = None,
    type_table: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(ids, table, weight, bias, position_ids, position_table, type_ids, type_table)
    return table.new_empty(ids.shape[0], table.shape[1])


def _check(
    ids: torch.Tensor,
    table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    position_table: torch.Tensor | None,
    type_ids: torch.Tensor | None,
    type_table: torch.Tensor | None,
) -> None:
    tokens, dim = ids.shape[:1], table.shape[1:]
    for name, rows, of in (
        ("", ids, table),
        ("position_", position_ids, position_table),
        ("type_", type_ids, type_table),
    ):
        if (rows is None) != (of is None):
            raise ValueError(f"{name}ids and {name}table must be given together")
        if rows is None or of is None:
            continue
        if rows.dim() != 1 or rows.shape != tokens or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}ids must be int32 or int64 [T], got {rows.dtype} {tuple(rows.shape)}")
        if of.dim() != 2 or of.shape[1:] != dim or of.dtype != table.dtype:
            raise ValueError(f"{name}table must be {table.dtype} [rows, D], got {of.dtype} {tuple(of.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != dim:
            raise ValueError(f"{name} must be [D] = {list(dim)}, got {tuple(vector.shape)}")


register(
    "embed_norm(Tensor ids, Tensor table, Tensor weight, Tensor? bias, float eps, *, Tensor? position_ids=None,"
    " Tensor? position_table=None, Tensor? type_ids=None, Tensor? type_table=None) -> Tensor",
    _run,
    _fake,
)
