"""Which layer exports where, how large are the files, and how long does a prediction take?

    python benchmarks/deployment.py

Each kind of layer is converted at 10 % and exported to every format; a cell is "ok", "dense" (it works, with zeros in the place
of what is not connected) or "refused". An export that works is computed again where it can be (ONNX by onnxruntime,
``torch.export``, the dense ``state_dict`` in the plain layer, CSR entry by entry), and has to agree with PyTorch. C is compiled
and run by the tests. For LeNet-300-100 at 1 % the second table has the bytes of each file and the time of one prediction (batch
1, one thread, medians of arms that take turns).
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_deepr import densify, export, load_state_dict, save_sparse, sparsify, zoo

HERE = Path(__file__).parent


class Last(nn.Module):
    """A recurrent or attention layer that returns its outputs alone."""

    def __init__(self, layer: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.layer, self.twice = layer, twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x, x)[0] if self.twice else self.layer(x)[0]


def layers() -> dict[str, tuple[nn.Module, torch.Tensor, Any]]:
    """Build one network of each kind: the module, an example, and what to convert."""
    sequence = torch.randn(2, 7, 16)
    return {
        "Linear, ReLU": (nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10)), torch.randn(2, 40), "all"),
        "Linear, Tanh": (nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 10)), torch.randn(2, 40), "all"),
        "Conv1d": (nn.Sequential(nn.Conv1d(8, 12, 3), nn.ReLU()), torch.randn(2, 8, 20), "all"),
        "Conv2d": (nn.Sequential(nn.Conv2d(4, 12, 3), nn.BatchNorm2d(12), nn.ReLU()), torch.randn(2, 4, 12, 12), "all"),
        "ConvTranspose2d": (nn.Sequential(nn.ConvTranspose2d(8, 6, 3)), torch.randn(2, 8, 6, 6), "all"),
        "LSTM": (Last(nn.LSTM(16, 20, batch_first=True)), sequence, "all"),
        "GRU": (Last(nn.GRU(16, 20, batch_first=True)), sequence, "all"),
        "RNN": (Last(nn.RNN(16, 20, batch_first=True)), sequence, "all"),
        "MultiheadAttention": (Last(nn.MultiheadAttention(16, 4, batch_first=True), twice=True), sequence, "all"),
        "Embedding": (nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 4)), torch.randint(50, (2, 7)), ["0", "1"]),
    }


def _agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def formats(folder: Path) -> dict[str, Callable[[nn.Module, nn.Module, torch.Tensor], str]]:
    """List the formats: a function exports, computes again where it can, and returns what the cell says."""

    def state_dict(net: nn.Module, plain: nn.Module, x: torch.Tensor) -> str:
        plain.load_state_dict(export.to_dense_state_dict(net))
        _agree(plain.eval()(x), net(x))
        return "dense"

    def sparse_file(net: nn.Module, plain: nn.Module, x: torch.Tensor) -> str:
        _agree(load_state_dict(plain, save_sparse(net, folder / "net.safetensors")).eval()(x), net(x))
        return "ok"

    def csr(net: nn.Module, plain: nn.Module, x: torch.Tensor) -> str:
        dense = export.to_dense_state_dict(net)
        for name, matrix in export.to_csr(net).items():
            _agree(matrix.to_dense().reshape(dense[name].shape), dense[name])
        return "ok"

    def torch_export(net: nn.Module, plain: nn.Module, x: torch.Tensor) -> str:
        _agree(torch.export.export(net, (x,)).module()(x), net(x))
        return "dense"

    def onnx(net: nn.Module, plain: nn.Module, x: torch.Tensor) -> str:
        export.to_onnx(net, folder / "net.onnx", x)  # runs the file, and compares
        return "dense"

    def c_header(net: nn.Module, plain: nn.Module, x: torch.Tensor) -> str:
        export.to_c_header(net, folder / "net.h")
        return "ok"

    def c_training(net: nn.Module, plain: nn.Module, x: torch.Tensor) -> str:
        export.to_c(net, folder / "program", train=True)
        return "ok"

    return {
        "dense state_dict": state_dict,
        "sparse file": sparse_file,
        "CSR, SciPy": csr,
        "torch.export": torch_export,
        "ONNX": onnx,
        "C, inference": c_header,
        "C, training": c_training,
    }


def matrix() -> list[dict[str, str]]:
    torch.manual_seed(0)
    found = []
    for name, (plain, x, targets) in layers().items():
        net = sparsify(copy.deepcopy(plain), 0.1, target_modules=targets).eval()
        row = {"layer": name}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for title, exported in formats(Path(folder)).items():
                try:
                    with torch.no_grad():
                        row[title] = exported(net, copy.deepcopy(plain), x)
                except ValueError as error:  # a refusal; anything else is a fault
                    row[title] = "refused"
                    print(f"{name}, {title}: {str(error).splitlines()[0]}")
        found.append(row)
    return found


def sizes(rounds: int) -> list[dict[str, str]]:
    """Measure LeNet-300-100 at 1 %, the zoo's file: bytes, and microseconds of one prediction."""
    import onnxruntime

    net, x = zoo.load("lenet300_100.deepr_1pct_mnist"), torch.rand(1, 784)
    dense = densify(copy.deepcopy(net))
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        torch.save(dense.state_dict(), folder / "dense.pt")
        save_sparse(net, folder / "net.safetensors")
        export.to_onnx(net, folder / "net.onnx", x)
        export.to_onnx(net, folder / "sparse.onnx", x, sparse=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        sessions = {
            one: onnxruntime.InferenceSession(str(folder / one), options, providers=["CPUExecutionProvider"])
            for one in ("net.onnx", "sparse.onnx")
        }
        graph = torch.export.export(net, (x,)).module()
        inputs = {session.get_inputs()[0].name: x.numpy() for session in sessions.values()}
        arms: dict[str, tuple[str, Callable[[], Any] | None, int]] = {
            "PyTorch, dense": ("dense.pt", lambda: dense(x), 0),
            "PyTorch, sparse file": ("net.safetensors", lambda: net(x), 0),
            "torch.export": ("", lambda: graph(x), 0),
            "ONNX": ("net.onnx", lambda: sessions["net.onnx"].run(None, inputs), 0),
            "ONNX, sparse=True": ("sparse.onnx", lambda: sessions["sparse.onnx"].run(None, inputs), 0),
        }
        for weights in ("float32", "int16", "int8"):
            made = export.to_c_header(net, folder / f"{weights}.h", weights=weights)
            arms[f"C, {weights} (constants)"] = ("", None, made.constant_bytes)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, (_, call, _bytes) in arms.items():
                for _ in range(50 if call else 0):
                    begin = time.perf_counter()
                    call()
                    seconds[arm].append(time.perf_counter() - begin)
        return [
            {
                "arm": arm,
                "bytes": str(size or ((folder / file).stat().st_size if file else "")),
                "us": f"{1e6 * statistics.median(seconds[arm]):.0f}" if seconds[arm] else "",
            }
            for arm, (file, _, size) in arms.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the tables (default: the script's)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, rows in (("deployment", matrix()), ("deployment_sizes", sizes(given.rounds))):
        with (given.out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        print("\n".join("| " + " | ".join(row.values()) + " |" for row in rows) + "\n")


if __name__ == "__main__":
    main()
