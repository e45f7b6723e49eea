"""The systems that are compared, each made from one stock model when it is asked for."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.common import DTYPES
from benchmarks.models import Inputs, Model, fit, hidden, ragged, unpadded
from benchmarks.nested import Nested
from benchmarks.store import short
from fastencoder import to_fast

STOCK, EAGER, FLASH = "stock sdpa", "stock eager", "flash attention 2"
NESTED = "nn.TransformerEncoder"
FAST, GRAPHS = "fastencoder", "fastencoder, CUDA graphs"
COMPILED, REDUCE, AUTOTUNE = "torch.compile dynamic", "torch.compile reduce-overhead", "torch.compile max-autotune"
OURS = (FAST, GRAPHS)

System = Callable[[Inputs], torch.Tensor]


class NotAvailable(Exception):
    """A system that this machine does not have; the message says what is missing."""


class Systems:
    """One model in one dtype, as every system runs it. All have the same weights."""

    def __init__(self, model: Model, dtype: str, device: torch.device, quick: bool) -> None:
        self.device = device
        with torch.inference_mode(False), torch.no_grad():  # parameters of inference mode are another kind of tensor
            self.exact = model.make(quick).to(device)
            fit(self.exact, unpadded(ragged(self.exact, model.kind, quick, device)[0]))
            _equal_eps(self.exact)
            self.stock = copy.deepcopy(self.exact).to(DTYPES[dtype])
        self.models: dict[str, nn.Module] = {STOCK: self.stock}
        self._made: dict[str, System | str] = {STOCK: partial(hidden, self.stock)}

    def get(self, name: str) -> System:
        """Raises NotAvailable; what has failed once is not tried again."""
        if name not in self._made:
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self._made[name] = self._make(name)
            except Exception as error:
                self.give_up(name, str(error) if isinstance(error, NotAvailable) else short(error))
        made = self._made[name]
        if isinstance(made, str):
            raise NotAvailable(made)
        return made

    def give_up(self, name: str, why: str) -> None:
        """Do not try this system again."""
        self._made[name] = why

    def _make(self, name: str) -> System:
        if name == NESTED:
            try:
                model: nn.Module = self.models.setdefault(name, Nested(self.stock))
            except ValueError as error:
                raise NotAvailable(str(error)) from None
            return model
        if name in (COMPILED, REDUCE, AUTOTUNE):
            return self._compile(name)
        model = copy.deepcopy(self.stock)
        if name == EAGER:
            model.set_attn_implementation("eager")
        elif name == FLASH:
            model.set_attn_implementation("flash_attention_2")
        elif name == FAST:
            to_fast(model)
        elif name == GRAPHS:
            if "cuda_graphs" not in inspect.signature(to_fast).parameters:
                raise NotAvailable("to_fast has no cuda_graphs")
            to_fast(model, cuda_graphs=True)
        self.models[name] = model
        return partial(hidden, model)

    def _compile(self, name: str) -> System:
        # Every shape and mode is one more compilation of the same code.
        torch._dynamo.config.recompile_limit = 64
        # A dry run stops at the traced graph: compiling it for a CPU takes minutes.
        how: dict[str, Any] = {"backend": "eager"} if self.device.type == "cpu" else {}
        if name == COMPILED:
            return partial(hidden, torch.compile(self.stock, dynamic=True, **how))
        mode = {REDUCE: "reduce-overhead", AUTOTUNE: "max-autotune"}[name]
        compiled = torch.compile(self.stock, dynamic=False, **(how or {"mode": mode}))

        def call(inputs: Inputs) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return hidden(compiled, inputs)

        return call


def _equal_eps(model: nn.Module) -> None:
    """`nn.TransformerEncoderLayer` has its fast path only where both norms of a layer have the same eps."""
    for layer in getattr(getattr(model, "encoder", None), "layer", ()):
        norms = [module for module in layer.modules() if isinstance(module, nn.LayerNorm)]
        for norm in norms[1:]:
            norm.eps = norms[0].eps
