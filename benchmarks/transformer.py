"""Does a small transformer train faster with a sparse weight than with a dense one, on a CPU?

    python benchmarks/transformer.py
    python benchmarks/transformer.py --threads 1 --clock cpu --rounds 3 --steps 1
    python benchmarks/transformer.py --root data --until 1.8

The first two time a whole training step of a GPT (``CharTransformer``: width 384, 6 layers, 6 heads, 8 x 256 characters,
AdamW): zero_grad, forward, loss, backward and the optimizer with its hooks, so with the rewiring of every step. The arms take
turns within each round; times are medians, divided by that of the dense network. The arms have a connectivity of the attention
and one of the feed-forward weights; embeddings and the last layer stay dense. "without products" is the dense network whose
converted layers return a fixed tensor: what is left of a step if a product takes no time. sparselab (0.2.2) replaces the same
layers, with SET, where it can be imported. ``--clock cpu`` takes the CPU time of the process, which others disturb less.

The third trains two networks of width 128, 4 layers, 4 heads on Tiny Shakespeare (``tinyshakespeare/input.txt`` in ``--root``),
12 x 64 characters per step, dense and with ``DeepR(0.1)``, until the loss of the validation text (its last 10 %, in nats per
character) is below the given one, and reports the steps and the seconds of training without the validation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Block, Row, medians, parser, prepare, save, take_turns, why_not
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_deepr import DeepR, decay_groups, sparsify
from lightning_deepr.models import CharTransformer

CHARACTERS = 65
Step = Callable[[], Any]


class _Fixed(torch.autograd.Function):
    """Returns a fixed tensor, and a fixed gradient, in no time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dx = dx
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        return ctx.dx, None, None


class WithoutProduct(nn.Module):
    """A linear layer of the right shapes that does not multiply."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.rows, self.fixed = layer.out_features, (torch.empty(0), torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed[1].shape != x.shape:
            self.fixed = torch.randn(*x.shape[:-1], self.rows), 1e-6 * torch.randn(x.shape)
        y: Tensor = _Fixed.apply(x, *self.fixed)
        return y


def replace(net: CharTransformer, make: Callable[[str, nn.Linear], nn.Module]) -> CharTransformer:
    """Replace the linear layers of attention and feed-forward."""
    for name, module in list(net.layers.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(net.layers.get_submodule(parent), own, make(name, module))
    return net


def converted(net: CharTransformer, attention: float, feed_forward: float, compute: str = "auto") -> CharTransformer:
    wanted = {"layers.*.attention.*": attention, "layers.*.expand": feed_forward, "layers.*.contract": feed_forward}
    return sparsify(net, wanted, target_modules=["layers.*"], compute=compute)  # type: ignore[return-value]


def optimizer_of(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(net, weight_decay=0.1), lr=lr, betas=(0.9, 0.99))


def sparselab(net: CharTransformer, attention: float, feed_forward: float) -> tuple[CharTransformer, Any] | str:
    """Replace the layers by those of sparselab, with SET."""
    try:
        from sparselab import SET, SparseLinear

        def make(name: str, layer: nn.Linear) -> nn.Module:
            share = attention if "attention" in name else feed_forward
            found: nn.Module = SparseLinear(layer.in_features, layer.out_features, sparsity=1 - share, bias=False)
            return found

        net = replace(net, make)
        algorithm = SET(1 - feed_forward, 0.3, 100)
        net.apply(algorithm)
    except Exception as error:  # a peer may fail to import for any reason
        return why_not(error)
    return net, algorithm


def steps_of(net: nn.Module, optimizer: Any, batch: Callable[[], tuple[Tensor, Tensor]], after: Step | None = None) -> Step:
    """Make a training step."""

    def step() -> None:
        x, y = batch()
        optimizer.zero_grad()
        cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        if after is not None:
            after()

    return step


def block_of(step: Step, now: Callable[[], float]) -> Block:
    def block(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            started = now()
            step()
            seconds.append(now() - started)
        return seconds

    return block


def measure(options: argparse.Namespace) -> list[Row]:
    """Time whole steps."""

    def network() -> CharTransformer:
        torch.manual_seed(0)
        return CharTransformer(CHARACTERS, options.width, options.layers, options.heads, options.context)

    def batch() -> tuple[Tensor, Tensor]:
        both = torch.randint(0, CHARACTERS, (options.batch, options.context + 1), generator=generator)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    generator = torch.Generator().manual_seed(0)
    now = time.process_time if options.clock == "cpu" else time.perf_counter
    arms: dict[str, Block] = {}
    failed: dict[str, str] = {}
    net: nn.Module = network()
    arms["dense"] = block_of(steps_of(net, optimizer_of(net, 3e-4), batch), now)
    net = replace(network(), lambda name, layer: WithoutProduct(layer))
    arms["without products"] = block_of(steps_of(net, optimizer_of(net, 3e-4), batch), now)
    for setting in options.settings.split(","):
        attention, feed_forward = (float(share) / 100 for share in setting.split("/"))
        for compute in options.compute.split(","):
            net = converted(network(), attention, feed_forward, compute)
            optimizer = optimizer_of(net, 3e-4)
            DeepR().attach(net, optimizer)
            arms[f"DeepR {setting} {compute}"] = block_of(steps_of(net, optimizer, batch), now)
    attention, feed_forward = (float(share) / 100 for share in options.settings.split(",")[0].split("/"))
    peer = sparselab(network(), attention, feed_forward)
    if isinstance(peer, str):
        failed["sparselab"] = peer
    else:
        net, algorithm = peer
        arms["sparselab"] = block_of(steps_of(net, torch.optim.AdamW(net.parameters(), lr=3e-4), batch, algorithm.step), now)
    take_turns(arms, 1, 2)  # compiles, allocates
    took = medians(take_turns(arms, options.rounds, options.steps))
    rows = [{"arm": name, "step / dense": f"{one / took['dense']:.3g}", "ms": f"{1e3 * one:.4g}"} for name, one in took.items()]
    return rows + [{"arm": name, "step / dense": why, "ms": ""} for name, why in failed.items()]


def text(root: Path) -> tuple[Tensor, Tensor]:
    """Read Tiny Shakespeare as numbers: the first 90 % for training, the last 10 % for validation."""
    characters = (root / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    number = {character: i for i, character in enumerate(sorted(set(characters)))}
    found = torch.tensor([number[character] for character in characters])
    return found[: int(0.9 * len(found))], found[int(0.9 * len(found)) :]


def validation_loss(net: nn.Module, held_out: Tensor, context: int) -> float:
    """Compute the mean loss over the whole text, in nats per character."""
    count = (len(held_out) - 1) // context
    x, y = held_out[: count * context].view(count, context), held_out[1 : count * context + 1].view(count, context)
    with torch.no_grad():
        parts = [
            cross_entropy(net(a).flatten(0, 1), b.flatten(), reduction="sum")
            for a, b in zip(x.split(64), y.split(64), strict=True)
        ]
    return float(sum(parts)) / (count * context)


def until(options: argparse.Namespace) -> list[Row]:
    """Train until the validation loss is below the wanted one."""
    training, held_out = text(options.root)
    context, rows = 64, []
    for arm in ("dense", "DeepR 10 %"):
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            net = CharTransformer(int(max(training.max(), held_out.max())) + 1, 128, 4, 4, context)
            if arm != "dense":
                sparsify(net, 0.1, target_modules=["layers.*"], seed=seed)
            optimizer = optimizer_of(net, options.lr)
            if arm != "dense":
                DeepR(seed=seed).attach(net, optimizer, total_steps=options.most)
            generator = torch.Generator().manual_seed(seed)

            def batch(generator: torch.Generator = generator) -> tuple[Tensor, Tensor]:
                at = torch.randint(0, len(training) - context, (12, 1), generator=generator) + torch.arange(context + 1)
                both = training[at]
                return both[:, :-1], both[:, 1:]

            step, seconds, done, loss = steps_of(net, optimizer, batch), 0.0, 0, float("inf")
            while done < options.most and loss >= options.until:
                started = time.perf_counter()
                for _ in range(options.every):
                    step()
                seconds += time.perf_counter() - started
                done += options.every
                loss = validation_loss(net, held_out, context)
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "lr": options.lr,
                    "steps": done,
                    "seconds": round(seconds, 1),
                    "loss": round(loss, 4),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--steps", type=int, default=2, help="steps per arm and round")
    asked.add_argument("--settings", default="30/10,10/10,5/2", help="connectivity of attention / feed-forward, in percent")
    asked.add_argument("--compute", default="auto", help="auto, dense, sparse, or several")
    asked.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    for name, value in (("width", 384), ("layers", 6), ("heads", 6), ("batch", 8), ("context", 256)):
        asked.add_argument(f"--{name}", type=int, default=value)
    asked.add_argument("--until", type=float, help="train to this validation loss instead, in nats per character")
    asked.add_argument("--root", type=Path, default=Path("data"), help="folder with tinyshakespeare/input.txt")
    asked.add_argument("--lr", type=float, default=2e-3)
    asked.add_argument("--most", type=int, default=5000, help="the most steps of a training")
    asked.add_argument("--every", type=int, default=100, help="steps between two validations")
    asked.add_argument("--seeds", type=int, default=1)
    options = asked.parse_args()
    prepare(options)
    if options.until is not None:
        save(until(options), options, "transformer_until")
    else:
        save(measure(options), options, "transformer")


if __name__ == "__main__":
    main()
