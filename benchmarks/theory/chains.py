"""Many independent chains of DEEP R, run by the library itself: ``sparsify``, a torch optimizer, ``DeepR().attach``.

A chain is a converted tensor with exactly K connections. One process steps all tensors like the layers of a network; each has
its own random draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from densities import Energy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deepr import DeepR, sparsify
from lightning_deepr.weights.find import converted_tensors


class Chains:
    """Tensors of ``groups`` x ``n`` weights with groups * k connections each; every group (row) has its own energy term.

    Args:
        tensors: number of independent tensors.
        groups: rows of each tensor; with 1 row exactly k of n weights are active in it.
        n: weights of a group.
        k: active weights of a group, on average over the rows of a tensor.
        energy: function of u = max(theta, 0) [..., n].
        optimizer: function that makes the optimizer from the parameters.
        alpha, temperature, seed: arguments of :class:`lightning_deepr.DeepR`.
    """

    def __init__(
        self,
        tensors: int,
        groups: int,
        n: int,
        k: int,
        energy: Energy,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        alpha: float,
        temperature: float,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)  # seeds the layers' initialization, which gives theta's start
        self.net = nn.ModuleList(nn.Linear(n, groups, bias=False) for _ in range(tensors))
        sparsify(self.net, k / n, distribution="uniform", seed=seed, compute="dense")
        converted = list(converted_tensors(self.net))
        self.n, self.rows, self.energy = n, tensors * groups, energy
        self.thetas, self.slots = [c.theta for c in converted], [c.slots for c in converted]
        assert all(slots.count == groups * k for slots in self.slots)
        places = torch.arange(groups * n)
        self.signs = torch.cat([slots.signs_at(places) for slots in self.slots]).view(self.rows, n)
        self.starts = (torch.arange(tensors) * groups * n).repeat_interleave(groups * k)
        self.tensor_of_row = torch.arange(tensors).repeat_interleave(groups)
        self.optimizer = optimizer(self.thetas)
        self.rewiring = DeepR(l1=alpha, temperature=temperature, lr_scale=1.0, newborn="start", seed=seed).attach(
            self.net, self.optimizer
        )
        self.compare_gradients()

    def u_of_layers(self) -> Tensor:
        """Compute s * w = max(theta, 0) of every place [rows, n] from the layers' weights."""
        weights: list[Tensor] = [layer.weight for layer in self.net]  # type: ignore[misc]
        return torch.cat(weights) * self.signs

    def places(self) -> Tensor:
        return torch.cat([slots.places for slots in self.slots]) + self.starts

    def u(self) -> Tensor:
        """Compute the same by one scatter for all tensors, several times faster than from the layers' weights."""
        dense = torch.zeros(self.rows * self.n).index_put((self.places(),), torch.cat([*self.thetas]))
        return dense.view(self.rows, self.n)

    def compare_gradients(self) -> None:
        """Check that the scatter and the layers' weights give theta the same gradient."""
        found = [torch.autograd.grad(self.energy(u).sum(), self.thetas) for u in (self.u(), self.u_of_layers())]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def step(self) -> None:
        for theta in self.thetas:
            theta.grad = None
        self.energy(self.u()).sum().backward()
        self.optimizer.step()  # steps theta; the hook then applies L1, noise, sign test and births

    @torch.no_grad()
    def state(self) -> tuple[Tensor, Tensor]:
        """Return the active connections (bool [rows, n]; theta = 0 is active) and u [rows, n]."""
        places = self.places()
        active = torch.zeros(self.rows * self.n, dtype=torch.bool)
        active[places] = True
        u = torch.zeros(self.rows * self.n)
        u[places] = torch.cat([theta.detach() for theta in self.thetas])
        return active.view(self.rows, self.n), u.view(self.rows, self.n)

    def close(self) -> None:
        self.compare_gradients()
        self.rewiring.remove()
