"""A small transformer that predicts the next character."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class _Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        parts = self.query_key_value(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        return self.dropout(self.projection(y.transpose(1, 2).reshape(batch, time, width)))


class _Layer(nn.Module):
    """Attention and a feed-forward part, each behind a layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.contract(gelu(self.expand(self.norm2(x)))))


class CharTransformer(nn.Module):
    """A decoder-only transformer in the shape that nanoGPT trains on a CPU: 4 layers of width 128, 4 heads, 64 characters.

    The attention and feed-forward weights (786,432 by default) are meant to be sparse: ``target_modules=["layers.*"]``. The two
    embeddings and the last layer stay dense. The start is GPT-2's: standard deviation .02, smaller by sqrt(2 * layers) in the
    two matrices of each layer that write to the residual stream.

    Args:
        characters: size of the vocabulary; Tiny Shakespeare has 65.
        width: width of the residual stream.
        layers: number of layers.
        heads: number of heads; divides ``width``.
        context: the largest number of characters.
        dropout: dropout probability.

    Shapes:
        input int64 [batch, time], time <= context, output [batch, time, characters] (logits).

    Example::

        >>> CharTransformer()(torch.zeros(2, 10, dtype=torch.int64)).shape
        torch.Size([2, 10, 65])
    """

    def __init__(
        self,
        characters: int = 65,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, found {heads}.")
        self.context = context
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                to_stream = name.endswith(("projection.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if to_stream else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        if time > self.context:
            raise ValueError(f"expected at most {self.context} characters, found {time}.")
        y = self.dropout(self.characters(x) + self.positions(torch.arange(time, device=x.device)))
        for layer in self.layers:
            y = layer(y)
        return self.head(self.norm(y))
