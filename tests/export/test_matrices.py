"""The dense state_dict and the CSR matrices hold the same network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_deepr import connections, densify, sparsify
from lightning_deepr.export import to_csr, to_dense_state_dict, to_scipy
from tests.helpers.exported import KINDS, kinds
from tests.helpers.layers import LAYERS, Layer, flat

pytestmark = pytest.mark.filterwarnings("ignore:.* is an int and means one single connection", "ignore:LSTM with projections")
table = pytest.mark.parametrize("layer", LAYERS, ids=str)


@table
def test_dense_state_dict_is_that_of_the_plain_layer(layer: Layer) -> None:
    sparse = sparsify(layer.build(), 0.3, target_modules=layer.target).eval()
    wanted = flat(sparse(*layer.feed()))
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    state = to_dense_state_dict(sparse)
    plain = layer.build(seed=5).eval()
    plain.load_state_dict(state)
    assert torch.allclose(flat(plain(*layer.feed())), wanted, atol=1e-5)
    for name, (_, places, values) in connections(sparse).items():
        assert torch.equal(state[name].reshape(-1)[places], values)
        assert int((state[name] != 0).sum()) == int((values != 0).sum())
    state[next(iter(state))].fill_(7)  # it is a copy: the module does not change
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())


@table
def test_csr_holds_every_connection(layer: Layer) -> None:
    sparse = sparsify(layer.build(), 0.3, target_modules=layer.target)
    dense, found = to_dense_state_dict(sparse), to_csr(sparse)
    assert found.keys() == connections(sparse).keys()
    for name, matrix in found.items():
        assert matrix.layout == torch.sparse_csr
        assert matrix.values().numel() == connections(sparse)[name][1].numel()
        assert torch.equal(matrix.to_dense(), dense[name].flatten(1))


@kinds
def test_every_method_exports_its_active_connections(kind: str) -> None:
    net = KINDS[kind]()
    plain = densify(copy.deepcopy(net))
    state = to_dense_state_dict(net)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    for name, matrix in to_csr(net).items():
        assert torch.equal(matrix.to_dense(), state[name])


def test_scipy_multiplies_as_the_layer_does() -> None:
    pytest.importorskip("scipy")
    net = sparsify(nn.Linear(40, 30, bias=False), 0.1)
    x = torch.randn(7, 40)
    matrix = to_scipy(net)["weight"]
    assert matrix.nnz == 120
    assert np.allclose((matrix @ x.numpy().T).T, net(x).detach().numpy(), atol=1e-5)


def test_what_is_too_large_to_be_dense_is_refused_and_is_a_matrix() -> None:
    net = sparsify(nn.Sequential(nn.Linear(200_000, 100_000, device="meta")), 50, device="cpu")
    with pytest.raises(RuntimeError, match=r"75 GiB.*to_csr"):
        to_dense_state_dict(net)
    assert to_csr(net)["0.weight"].values().numel() == 50
