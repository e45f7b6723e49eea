"""`batch_invariant=True`: the bits of a sequence's output depend on that sequence alone, neither on those that share its batch
nor on padding.

What is element-wise, looked up or normalised has this property anyway. A matrix product has it where the order of its sums
depends on nothing but its own sizes: on the CPU in the C++ extension, on CUDA in the Triton kernels inside of
`kernels.batch_invariant`. So layers are multiplied there, and linears outside of the layers as well. What else a model may
hold is checked here and refused by name: where nobody knows the order of the sums, nothing is promised.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
from collections.abc import Iterator
from types import CodeType

import torch
from torch import nn

from .. import kernels
from ..kernels import native
from ..kernels._dispatch import batch_invariant, on_gpu
from ..kernels.linear import cpu_native
from ..kernels.linear.reference import ACTIVATIONS
from ..norms import norm_kind
from ..parts import lookup
from ..spec import NORM_SLOTS, LayerSpec

# Kinds of attention of which all sums are those of the extension, of the Triton kernels, or of a row by itself.
_KINDS = frozenset(
    {
        "plain",
        "position-bias",
        "rope",
        "rope-interleaved",
        "rope-neighbours",
        "rope-roformer",
        "rope-windowed",
        "t5",
        "t5-own",
        "windowed",
    }
)
# On CUDA the blocks of attention depend on what a batch makes of masks and biases.
_KINDS_ON_CUDA = frozenset({"plain", "rope", "rope-interleaved", "rope-neighbours", "rope-roformer"})
# Of torch.nn and of transformers, without a sum over anything but a row; exact GELU rounds alike wherever an element lies.
_BY_ROW = frozenset(
    {
        "Dropout",
        "Embedding",
        "GELUActivation",
        "Identity",
        "LayerNorm",
        "ModuleDict",
        "ModuleList",
        "ReLU",
        "Sequential",
        "Tanh",
    }
)
# Calls in a model's own code whose sums may go over tokens, or in an order that depends on the size of the batch.
_SUMS = frozenset(
    {
        "addmm",
        "avg_pool1d",
        "baddbmm",
        "bmm",
        "conv1d",
        "conv2d",
        "cosine_similarity",
        "einsum",
        "interpolate",
        "linear",
        "matmul",
        "mean",
        "mm",
        "multi_head_attention_forward",
        "scaled_dot_product_attention",
        "silu",
        "softmax",
        "sum",
    }
)


class BatchVariantError(RuntimeError):
    """A model that was converted with `batch_invariant=True` cannot keep to it in this call."""

    def __init__(self, reason: object) -> None:
        super().__init__(
            f"batch_invariant=True does not hold for this call: {reason}. Change the call, or convert the model without it."
        )


class InvariantLinear(nn.Linear):
    """`nn.Linear` outside of the fast layers, multiplied as inside of them. Its class is changed in place, and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if (x.dtype, x.device, x.shape[-1:]) != (weight.dtype, weight.device, weight.shape[1:]):
            return super().forward(x)  # an error, in torch's words
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            raise BatchVariantError("a gradient may be needed; use torch.inference_mode() or torch.no_grad()")
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            raise BatchVariantError("it is being compiled or traced")
        reason = _weight_refusal(weight)
        if reason is not None:
            raise BatchVariantError(reason)
        rows = x.reshape(-1, x.shape[-1])
        if on_gpu(x.device):
            with batch_invariant():
                product = kernels.linear(rows, weight, bias)
        else:
            product = cpu_native.linear(rows, weight if weight.stride(1) == 1 else weight.contiguous(), bias)
        return product.view(*x.shape[:-1], weight.shape[0])


@contextlib.contextmanager
def invariant_kernels(device: torch.device) -> Iterator[None]:
    """On CUDA, kernels that are chosen without a look at the batch; the extension's are on the CPU."""
    with batch_invariant() if on_gpu(device) else contextlib.nullcontext():
        yield


def layer_refusal(layer: nn.Module, spec: LayerSpec, weights: list[torch.Tensor]) -> str | None:
    """Why the bits of this layer's output would depend on the batch, or None. `weights` are its plain ones."""
    adapter, names = spec.adapter, spec.names
    on_cuda = on_gpu(weights[0].device)
    if adapter.attention not in (_KINDS_ON_CUDA if on_cuda else _KINDS):
        return f"nobody has fixed the order of the sums of its kind of attention ({adapter.attention})"
    if spec.opaque:
        return f"{', '.join(sorted(spec.opaque))} is no plain linear: merge it"
    if not spec.intermediate_size or spec.has_choice or adapter.chosen_last:
        return "its feed-forward block is called as it is"
    if spec.activation not in ACTIVATIONS:
        return "its activation is called as it is"
    norms = {path: lookup(layer, path) for path in names.given(NORM_SLOTS).values()}
    for path, norm in norms.items():
        if type(norm) is not nn.Identity and norm_kind(norm) is None:
            return f"its norm {path} is called as it is"
    if spec.wide or (names.output_norm2 and names.scale2):
        return "some of its sums are left to PyTorch"
    if adapter.clamp in ("non-finite", "each-block") and weights[0].dtype == torch.float16:
        return "its guard against overflow of float16 looks at all tokens of the batch"
    if any(weight.is_inference() for weight in weights):
        return "its weights were made in inference mode: a copy of them could be stale"
    return _weight_refusal(weights[0])


def _weight_refusal(weight: torch.Tensor) -> str | None:
    if on_gpu(weight.device):
        fits = weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return None if fits else f"there is no Triton kernel for {weight.dtype}"
    if weight.device.type not in ("cpu", "meta"):
        return f"there is no kernel of its own for {weight.device.type}"
    if native.current == 0:
        return "on the CPU it takes the C++ extension, which is not there (docs/cpu.md says how to build it)"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"on the CPU it is there for float32 and bfloat16, not for {weight.dtype}"
    return None


def linears_outside(model: nn.Module, inside: tuple[str, ...]) -> list[nn.Linear]:
    """The plain linears of a model outside of the layers whose paths are `inside`."""
    return [module for _, module in _outside(model, inside) if type(module) is nn.Linear]


def refusals_outside(model: nn.Module, inside: tuple[str, ...]) -> list[tuple[str, nn.Module, str]]:
    """What else of a model would make its bits depend on the batch: path, module and reason."""
    found = []
    for name, module in _outside(model, inside):
        reason = _refusal_outside(module)
        if reason is not None:
            found.append((name, module, reason))
    return found


def _outside(model: nn.Module, inside: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    prefixes = tuple(f"{name}." for name in inside)
    for name, module in model.named_modules():
        if name not in inside and not name.startswith(prefixes):
            yield name, module


def _refusal_outside(module: nn.Module) -> str | None:
    cls = type(module)
    if "forward" in vars(module):
        return "its forward was replaced"
    if cls is nn.Linear:
        return _weight_refusal(module.weight)
    library = cls.__module__.startswith(("torch.nn.", "transformers.activations"))
    if library and cls.__name__ in _BY_ROW or norm_kind(module) is not None:
        return None
    if library:
        return f"nobody has fixed the order of the sums of torch's {cls.__name__}"
    if not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in module.parameters(recurse=False)):
        return f"{cls.__name__} has a matrix, and nobody has fixed the order of the sums over it"
    sums = sorted(_sums_of(cls))
    return (
        f"the code of {cls.__name__} calls {', '.join(sums)}, which may sum over the batch in any order"
        if sums
        else None
    )


def _sums_of(cls: type) -> set[str]:
    """The names in `_SUMS` that the forward of a class mentions, or what it calls of its own class and file."""
    if cls.__name__.endswith("RotaryEmbedding"):
        return set()  # an outer product: each element is one multiplication
    found: set[str] = set()
    seen: set[CodeType] = set()
    forward = inspect.unwrap(cls.forward)
    left = [getattr(forward, "__code__", None)]
    in_file = getattr(forward, "__globals__", {})
    while left:
        code = left.pop()
        if code is None or code in seen:
            continue
        seen.add(code)
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        found |= {name for name in code.co_names if name in _SUMS or "matmul" in name}
        found |= {
            "@" for step in dis.get_instructions(code) if step.opname == "BINARY_OP" and step.argrepr in ("@", "@=")
        }
        for name in code.co_names:
            function = getattr(cls, name, None) or in_file.get(name)
            function = inspect.unwrap(function) if inspect.isfunction(function) else None
            if function is not None and function.__module__ == cls.__module__:
                left.append(function.__code__)
    return found
