"""The records of the kinds of layers: torch's own, and one of the user's."""

from __future__ import annotations

import torch
from torch import nn

from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.selection import candidates
from lightning_deepr.conversion.start import soft_start


def test_a_convolution_of_soft_deepr_is_compiled_in_one_graph() -> None:
    net = nn.Conv2d(3, 4, 3)
    convert(net, candidates(net), {"weight": 20}, init="module", seed=0, compute="dense", begin=soft_start)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
