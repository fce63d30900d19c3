"""Write model.h and digits.h for main.c: a sparse LeNet-300-100 and 100 digits with PyTorch's outputs.

    lightning-deepr fit --config mnist_quickstart      # about a minute; every sparse checkpoint of a LeNet-300-100 works
    python examples/c/make_example.py runs/mnist_quickstart/sparse.safetensors --out build/c
    cd build/c && cc -O2 -std=c99 -Wall -Werror -o digits main.c && ./digits

The digits are the first 100 of the embedded test set. ``--weights int8`` stores each weight in one byte: the outputs then
differ from PyTorch's, and main.c prints by how much.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import load_state_dict
from lightning_deepr.export import CHeader, to_c_header
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits

HERE = Path(__file__).resolve().parent
DIGITS = 100


def digits_header(images: Tensor, labels: Tensor, outputs: Tensor, tolerance: float) -> str:
    """Write C source with the digits (uint8 [n, 28, 28]), their labels and the expected outputs (float [n, classes])."""

    def rows(kind: str, name: str, values: list[list[Any]]) -> Iterator[str]:
        yield f"static const {kind} {name}[{len(values)}][{len(values[0])}] = {{"
        yield from ("    {" + ", ".join(map(str, row)) + "}," for row in values)
        yield "};"

    expected = [[f"{value:.9e}f" for value in row] for row in outputs.tolist()]
    lines = [
        "/* Digits of MNIST (LeCun, Cortes, Burges), their labels, and the outputs of PyTorch. Written by make_example.py. */",
        f"#define DIGITS {len(images)}",
        f"#define TOLERANCE {tolerance:.9e}f",
        *rows("unsigned char", "digits", images.flatten(1).tolist()),
        f"static const int labels[{len(labels)}] = {{{', '.join(map(str, labels.tolist()))}}};",
        *rows("float", "expected", expected),
    ]
    return "\n".join(lines) + "\n"


@torch.no_grad()
def write(net: nn.Module, out: Path, weights: Any = "float32", count: int = DIGITS) -> CHeader:
    """Write both headers and the C sources into one folder.

    With float32 weights the tolerance is 1e-5 of the largest output, because the order of the sums differs. Quantized weights
    have no limit.
    """
    out.mkdir(parents=True, exist_ok=True)
    header = to_c_header(net, out / "model.h", weights=weights)
    _, _, images, labels = embedded_digits()
    images, labels = images[:count], labels[:count]
    outputs = net.eval()(images.flatten(1).float() / 255)
    largest = float(outputs.abs().max())
    tolerance = 1e-5 * max(largest, 1.0) if weights == "float32" else 1e30
    (out / "digits.h").write_text(digits_header(images, labels, outputs, tolerance))
    for source in ("main.c", "firmware.c"):
        if (HERE / source).resolve() != (out / source).resolve():
            shutil.copy(HERE / source, out / source)
    print(header)
    print(f"outputs of PyTorch are at most {largest:.3g}")
    return header


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a sparse checkpoint of a LeNet-300-100")
    parser.add_argument("--out", type=Path, default=Path("build/c"))
    parser.add_argument("--weights", choices=("float32", "int16", "int8"), default="float32")
    given = parser.parse_args(arguments)
    write(load_state_dict(LeNet300100(), given.checkpoint), given.out, given.weights)


if __name__ == "__main__":
    main()
