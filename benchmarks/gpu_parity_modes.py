"""The other ways to run a fast model: from CUDA graphs, and inside torch.compile. Same answers, by the same bars."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx

import fastencoder
from benchmarks.common import DTYPES
from benchmarks.gpu_judge import not_available
from benchmarks.gpu_parity import Workbench, count_calls, states, what_went_wrong
from benchmarks.models import Model, cast, hidden
from fastencoder import to_fast
from fastencoder.layers import FastLayer


def graphs(bench: Workbench, model: Model, dtype: str) -> dict[str, Any]:
    """Answers from graphs: at each repetition the same, and again those of stock after the weights have changed."""
    if "cuda_graphs" not in inspect.signature(to_fast).parameters:
        return not_available("to_fast has no cuda_graphs")
    bench.load(model)
    stock = copy.deepcopy(bench.exact).to(DTYPES[dtype])
    working = to_fast(copy.deepcopy(stock), cuda_graphs=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if hasattr(fastencoder, "warmup"):
            fastencoder.warmup(working, [(2, 16), [9, 1, 16]])
        runs = [bench.run(working, DTYPES[dtype]) for _ in range(4)]
        wanted = bench.run(stock, DTYPES[dtype])
        why: list[str] = []
        errors = bench.compare(wanted, runs[-1], dtype, why)
        for again in runs[2:]:
            if not all(torch.equal(a, b) for a, b in zip(bench.real_only(again), bench.real_only(runs[1]), strict=True)):
                why.append("a replay returned something else")
        replays = sum(runner.replays for runner in _runners(working))
        changed = _after_a_change(bench, stock, working, dtype)
    if changed > 3:
        why.append(f"after a change of weights the answers are {changed:.1f} times as far from stock as before")
    if bench.device.type == "cuda" and bench.exact is not None and not replays:
        why.append("nothing ran from a graph")
    if count_calls(working)[1]:
        why.append(f"delegated: {sorted({state.last_reason for state in states(working) if state.last_reason})}")
    why += what_went_wrong(caught)
    found = {"passed": not why, "why": " | ".join(why), "model": model.name, "dtype": dtype, **errors}
    return found | {"replays": replays, "after_new_weights": changed}


def _runners(model: nn.Module) -> list[Any]:
    """The graph runners of a model's stacks, each once."""
    stacks = {id(state.stack): state.stack for state in states(model) if state.stack is not None}
    return [stack.graphs for stack in stacks.values() if getattr(stack, "graphs", None) is not None]


def _after_a_change(bench: Workbench, stock: nn.Module, working: nn.Module, dtype: str) -> float:
    """How far the fast model is from stock after both got other weights, as a multiple of what it was before."""

    def distance() -> float:
        theirs, ours = (bench.tokens(bench.run(m, DTYPES[dtype])).double() for m in (stock, working))
        return float((ours - theirs).norm() / theirs.norm())

    before = max(distance(), float(torch.finfo(DTYPES[dtype]).eps))
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        state = stock.state_dict()
        layer = next(name for name, module in working.named_modules() if isinstance(module, FastLayer))
        name = next(name for name, value in state.items() if name.startswith(f"{layer}.") and value.dim() == 2)
        noise = torch.randn(state[name].shape, generator=generator).to(state[name])
        state[name] = state[name] + noise * state[name].std()
        for one in (stock, working):
            one.load_state_dict(state)
    after = [distance() for _ in range(3)]  # without a graph, captured, replayed
    return max(after) / before


def compiled(bench: Workbench, model: Model, dtype: str) -> dict[str, Any]:
    """The encoder of a fast model under torch.compile without a graph break, against the same model as it is."""
    bench.load(model)
    stock = copy.deepcopy(bench.exact).to(DTYPES[dtype])
    working = to_fast(copy.deepcopy(stock))
    wanted, plain = bench.run(stock, DTYPES[dtype]), bench.run(working, DTYPES[dtype])
    operators: set[str] = set()

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        operators.update(str(node.target) for node in graph.graph.nodes if "fastencoder" in str(node.target))
        # A dry run stops at the traced graph: compiling it for a CPU takes long.
        return graph if bench.device.type == "cpu" else compile_fx(graph, example_inputs)

    owner = working.get_submodule(_common_owner(working))
    owner.compile(fullgraph=True, backend=backend)  # with its hooks
    why: list[str] = []
    with torch.inference_mode():
        found = [hidden(working, cast(inputs, DTYPES[dtype])) for inputs in bench.calls]
    if not operators:
        return not_available("under torch.compile the layers run their original code")
    errors = bench.compare(wanted, found, dtype, why)
    bits = all(torch.equal(a, b) for a, b in zip(bench.real_only(found), bench.real_only(plain), strict=True))
    result = {"passed": not why, "why": " | ".join(why), "model": model.name, "dtype": dtype, **errors}
    return result | {"same_bits_as_eager": bits, "operators": sorted(operators)}


def _common_owner(model: nn.Module) -> str:
    """The module whose forward loops over the layers."""
    layers = {id(layer) for layer in model.modules() if isinstance(layer, FastLayer)}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module and id(module[0]) in layers:
            return name.rpartition(".")[0]
    raise RuntimeError("no list of fast layers was found")

