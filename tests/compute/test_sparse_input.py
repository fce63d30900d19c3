"""Linear layers with sparse (COO, CSR, ...) and nested inputs compute as the dense layer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import SparseLinear, sparsify

COMPUTES = ["auto", "dense", "sparse"]
LAYOUTS: dict[str, Any] = {
    "coo": lambda x: x.to_sparse(),
    "uncoalesced": lambda x: torch.sparse_coo_tensor(
        torch.cat([x.to_sparse().indices()] * 2, 1), torch.cat([x.to_sparse().values() / 2] * 2), x.shape
    ),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
    "bsc": lambda x: x.to_sparse_bsc((2, 2)),
    "nothing": lambda x: (x * 0).to_sparse(),
}


class OwnLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(30, 20) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_inputs(layout: str, compute: str, bias: bool, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:  # the way of inputs that can't be made dense
        monkeypatch.setattr("lightning_deepr.compute.sparse_input.LARGEST", 0)
    torch.manual_seed(0)
    x = torch.randn(6, 20) * (torch.rand(6, 20) < 0.2)
    given = LAYOUTS[layout](x)
    if compute == "dense" and layout == "bsc":  # torch's own dense layer does not take it
        for net in (nn.Linear(20, 30, bias=bias), sparsify(nn.Linear(20, 30, bias=bias), 0.2, compute=compute)):
            with pytest.raises(RuntimeError, match="not implemented"):
                net(given)
        return
    for make in (lambda: nn.Linear(20, 30, bias=bias), OwnLinear):
        net = sparsify(make(), 0.2, target_modules=["weight"], compute=compute)
        expected = net(given.to_dense())
        expected.square().sum().backward()
        gradients = [p.grad for p in net.parameters()]
        net.zero_grad()
        y = net(given)
        torch.testing.assert_close(y, expected)
        if compute == "dense" and layout in ("bsr", "bsc"):
            continue  # torch's own dense layer has no gradient for it
        y.square().sum().backward()
        torch.testing.assert_close([p.grad for p in net.parameters()], gradients)
        with torch.no_grad():
            torch.testing.assert_close(net(given), expected.detach())


@pytest.mark.parametrize("compute", ["auto", "sparse"])
@pytest.mark.parametrize("large", [False, True])
def test_the_gradient_of_a_sparse_input(large: bool, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr("lightning_deepr.compute.sparse_input.LARGEST", 0)
    net = sparsify(nn.Linear(20, 30), 0.2, compute=compute)
    x = torch.randn(6, 20) * (torch.rand(6, 20) < 0.2)
    dense = x.clone().requires_grad_()
    net(dense).square().sum().backward()
    given = x.to_sparse().requires_grad_()
    net(given).square().sum().backward()
    found = given.grad.to_dense()  # type: ignore[union-attr]
    torch.testing.assert_close(found * (x != 0), dense.grad * (x != 0))  # type: ignore[operator]


def test_a_sparse_input_as_wide_as_a_sparse_layer() -> None:
    layer = SparseLinear(1_000_000, 1_000, connectivity=100_000)
    at = torch.stack([torch.arange(40) % 8, torch.randint(0, 1_000_000, (40,))])
    y = layer(torch.sparse_coo_tensor(at, torch.randn(40), (64, 1_000_000)))
    assert y.shape == (64, 1_000) and not y.isnan().any()
    y.sum().backward()
    assert layer.parametrizations.weight.original.grad is not None  # type: ignore[union-attr, index]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:.*nested.*")
def test_nested_inputs(layout: torch.layout, compute: str) -> None:
    net = sparsify(nn.Linear(20, 30), 0.2, compute=compute)
    parts = [torch.randn(3, 20), torch.randn(5, 20)]
    y = net(torch.nested.nested_tensor(parts, layout=layout))
    for found, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(found, net(part))
    y.to_padded_tensor(0.0).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("compute", COMPUTES)
def test_sparse_inputs_that_do_not_fit_get_torchs_error(compute: str) -> None:
    net = sparsify(nn.Linear(20, 30), 0.2, compute=compute)
    for x in (torch.randn(6, 21).to_sparse(), torch.randn(6, 20).double().to_sparse()):
        with pytest.raises(RuntimeError):
            net(x)
