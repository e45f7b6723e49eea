"""Layers of somebody's own, with the names that the documents' examples have."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

WIDTH, HEADS = 16, 2


class MyBertLayer(BertLayer):
    """Computes what BertLayer computes, under the same names."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, attention_mask, **kwargs)


class Attention(nn.Module):
    """Softmax attention; `names` are those of its linears for queries, keys, values and output."""

    def __init__(self, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.names, self.num_heads = names, HEADS
        self.scale = (WIDTH // HEADS) ** -0.5
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        *inputs, output = (getattr(self, name) for name in self.names)
        query, key, value = (linear(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in inputs)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return output(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(hidden)))


class MyLayer(nn.Module):
    """Norms after the blocks."""

    def __init__(self, config: BertConfig | None = None) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(("q", "k", "v", "o")), FeedForward()
        self.norm_a, self.norm_b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states, attention_mask=None):
        hidden_states = self.norm_a(hidden_states + self.attn(hidden_states, attention_mask))
        return self.norm_b(hidden_states + self.mlp(hidden_states))


class MyPreLayer(nn.Module):
    """Norms in front of the blocks."""

    def __init__(self, config: BertConfig | None = None) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(("wq", "wk", "wv", "wo")), FeedForward()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden_states, attention_mask=None):
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), attention_mask)
        return hidden_states + self.mlp(self.norm2(hidden_states))
