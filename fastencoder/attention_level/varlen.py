"""An attention module whose class was swapped for a subclass that leaves padding out of its attention.

Its own forward still computes everything else: projections, norms, rotations, whatever the class does. While that forward
runs, `config` answers with another name for the attention function, in this thread and for this module alone.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ..layers.arguments import read_arguments
from ..layers.guards import Delegated, refuse_mode
from ..layers.traffic import Traffic
from .interface import KNOWN_FUNCTIONS, NAME, implementation_of
from .window import abandon_windows

# Arguments of an attention's forward that make it something else than self-attention, or ask it for its weights.
_NOT_PLAIN = (
    "cross_attention_states",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "key_value_states",
    "layer_past",
    "output_attentions",
    "past_key_value",
    "past_key_values",
)


class AttentionState:
    """What a converted attention module knows beside its own parameters, outside of the state_dict.

    Args:
        padding_is_read: why masked calls are passed on (something may read the positions of padding), or None if the real
            tokens of this model do not depend on them.
        traffic: which forwards of the converted model run.

    Attributes:
        fast_calls, delegated_calls: how many calls ran varlen, and how many ran the function of before.
        last_reason: why the latest delegated call was.
    """

    def __init__(self, padding_is_read: str | None, traffic: Traffic | None = None) -> None:
        self.padding_is_read = padding_is_read
        self.traffic = traffic or Traffic()
        self.fast_calls = 0
        self.delegated_calls = 0
        self.last_reason: str | None = None

    def delegated(self, reason: str) -> None:
        """Counts a call that ran the function of before."""
        self.delegated_calls += 1
        self.last_reason = reason

    def __getstate__(self) -> dict[str, Any]:
        return {"padding_is_read": self.padding_is_read, "traffic": self.traffic}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Routed(threading.local):
    """The attention modules whose forward runs in this thread, the innermost last."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []


_routed = _Routed()


class _RoutedConfig:
    """A config that names another attention function."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class VarlenAttention(nn.Module):
    """Mixed in before the attention's own class (see `classes.varlen_class`)."""

    original_class: type[nn.Module]
    _fastencoder_attention: AttentionState

    @property
    def config(self) -> Any:
        """The module's config; while its forward is routed, one that names this package's attention function."""
        own = self.__dict__["config"]
        if torch.compiler.is_compiling() or not (_routed.modules and _routed.modules[-1] is self):
            return own
        return _RoutedConfig(own)

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = getattr(self, "_fastencoder_attention", None)
        if state is None:  # `reverse` ran since this method was looked up
            return self.forward(*args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(*args, **kwargs)
        with state.traffic.forward():
            if vars(self).get("_fastencoder_attention") is state:
                return self._answer(args, kwargs)
        return self.forward(*args, **kwargs)

    def _answer(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            _refuse(self, args, kwargs)
        except Delegated as reason:
            self._fastencoder_attention.delegated(str(reason))
            return super().forward(*args, **kwargs)
        _routed.modules.append(self)
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            abandon_windows()
            raise
        finally:
            _routed.modules.pop()


def _refuse(module: VarlenAttention, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises Delegated for a call that is not plain self-attention in evaluation."""
    name = implementation_of(module)
    if name not in (*KNOWN_FUNCTIONS, NAME):
        raise Delegated(f"the model's attention implementation is {name!r}")
    given = read_arguments(module.original_class, args, kwargs)
    for argument in _NOT_PLAIN:
        value = given.get(argument)
        if value is not None and value is not False:
            raise Delegated(f"the argument {argument} is given")
    hidden = next((value for value in given.values() if isinstance(value, torch.Tensor)), None)
    if hidden is None:
        raise Delegated("no tensor is given")
    refuse_mode(module, hidden)
