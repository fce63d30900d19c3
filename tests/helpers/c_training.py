"""Training in C: compiles the exported program and runs it beside an oracle in NumPy that takes every sum in the same order."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.oracle import BIRTH, NOISE, bits, key, normal, signs

CC = shutil.which("cc")
needs_cc = pytest.mark.skipif(CC is None, reason="no C compiler (cc) on this machine")
WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
QUANTUM = np.float32(2.0**-12)
ROUND = 8

_SHIM = """\
#include "deepr_net.h"
static deepr_net net;
void start(uint32_t seed);
int predict(const deepr_input *x);
float train(const deepr_input *x, const uint16_t *labels, float lr, float progress);
int check(void);
size_t save(uint8_t *buffer, size_t size);
int load(const uint8_t *buffer, size_t size);
uint32_t copy(uint32_t layer, uint32_t count, uint32_t *places, float *weights);
size_t sizes(int which);
void start(uint32_t seed) { deepr_init(&net, seed); }
int predict(const deepr_input *x) { return deepr_predict(&net, x); }
float train(const deepr_input *x, const uint16_t *labels, float lr, float progress)
{
    return deepr_train_step(&net, x, labels, lr, progress);
}
int check(void) { return deepr_check(&net); }
size_t save(uint8_t *buffer, size_t size) { return deepr_save(&net, buffer, size); }
int load(const uint8_t *buffer, size_t size) { return deepr_load(&net, buffer, size); }
uint32_t copy(uint32_t layer, uint32_t count, uint32_t *places, float *weights)
{
    uint32_t k;
    for (k = 0; k < count; k++)
        places[k] = deepr_connection(&net, layer, k, weights + k);
    return deepr_connection(&net, layer, count, weights);
}
size_t sizes(int which)
{
    const size_t all[] = {sizeof net, DEEPR_STATE_BYTES, DEEPR_INPUTS, DEEPR_OUTPUTS, DEEPR_BATCH, DEEPR_CONNECTIONS};
    return all[which];
}
"""


class Program:
    """The program in ``folder``, compiled as a library. It has one network, which is static."""

    def __init__(self, folder: Path, *flags: str) -> None:
        assert CC is not None
        (folder / "shim.c").write_text(_SHIM)
        library = folder / f"run{len(list(folder.glob('*.so')))}.so"
        command = [CC, "-O0", *WARNINGS, "-DDEEPR_CHECK", *flags, "-shared", "-fPIC", "-o", str(library)]
        done = subprocess.run(
            [*command, str(folder / "deepr_net.c"), str(folder / "shim.c")], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        self.c = ctypes.CDLL(str(library))
        self.c.train.restype, self.c.sizes.restype, self.c.save.restype = ctypes.c_float, ctypes.c_size_t, ctypes.c_size_t
        self.c.copy.restype = ctypes.c_uint32
        self.net_bytes, self.state_bytes, self.inputs, self.outputs, self.batch, self.count = map(self.c.sizes, range(6))

    def start(self, seed: int) -> None:
        self.c.start(ctypes.c_uint32(seed))

    def predict(self, x: np.ndarray) -> int:
        return int(self.c.predict(ctypes.c_void_p(np.ascontiguousarray(x).ctypes.data)))

    def train(self, x: np.ndarray, labels: Sequence[int] | np.ndarray, lr: float, progress: float = 0.0) -> float:
        x, labels = np.ascontiguousarray(x), np.ascontiguousarray(labels, np.uint16)
        assert x.size == self.batch * self.inputs and labels.size == self.batch
        return float(
            self.c.train(
                ctypes.c_void_p(x.ctypes.data),
                ctypes.c_void_p(labels.ctypes.data),
                ctypes.c_float(lr),
                ctypes.c_float(progress),
            )
        )

    def check(self) -> int:
        return int(self.c.check())

    def save(self, size: int | None = None) -> bytes:
        buffer = ctypes.create_string_buffer(self.state_bytes)
        written = self.c.save(buffer, ctypes.c_size_t(self.state_bytes if size is None else size))
        return buffer.raw[:written]

    def load(self, state: bytes) -> int:
        return int(self.c.load(state, ctypes.c_size_t(len(state))))

    def connections(self, layer: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the places, uint32, and the weights, float32 with the sign of a place at theta 0, too."""
        places, weights = np.zeros(count, np.uint32), np.zeros(count + 1, np.float32)
        end = self.c.copy(layer, count, ctypes.c_void_p(places.ctypes.data), ctypes.c_void_p(weights.ctypes.data))
        assert end == 2**32 - 1
        return places, weights[:count]


@dataclass
class OracleLayer:
    """A sparse layer, or a dense one (``dense``: its weights are trained as they are)."""

    rows: int
    columns: int
    theta: np.ndarray
    places: np.ndarray
    bias: np.ndarray | None
    index: int = 0
    sign_seed: int = 0
    step: int = 0
    exceptions: frozenset[int] = frozenset()
    dense: np.ndarray | None = None
    reborn: list[int] = field(default_factory=list)

    @property
    def signs(self) -> np.ndarray:
        found = signs(self.sign_seed, self.places)
        opposite = np.array([place in self.exceptions for place in self.places.tolist()], bool)
        return np.where(opposite, -found, found).astype(np.float32) if self.exceptions else found.astype(np.float32)

    @property
    def weights(self) -> np.ndarray:
        return self.theta * self.signs if self.dense is None else self.dense.reshape(-1)

    @property
    def where(self) -> tuple[np.ndarray, np.ndarray]:
        places = self.places if self.dense is None else np.arange(self.rows * self.columns)
        return places // self.columns, places % self.columns


def exp(x: np.ndarray) -> np.ndarray:
    """Compute exp in float32, after Cephes, as the C program does."""
    f = np.float32
    n = (x * f(1.44269504) - f(0.5)).astype(np.int32).astype(f)
    r = (x - n * f(0.693359375)) - n * f(-2.12194440e-4)
    y = np.full_like(r, f(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + f(c)
    y = (y * r) * r + r + f(1)
    return np.where(x > -87, y * np.exp2(n).astype(f), f(0))


@dataclass
class Oracle:
    """The network, in float32 and in C's order: slots within a sum over connections, samples within a gradient."""

    layers: list[OracleLayer]
    seed: int
    narrow: bool = False

    def step(
        self, x: np.ndarray, labels: np.ndarray, lr: float, alphas: Sequence[float], temperature: float = 0.0
    ) -> list[np.ndarray]:
        """Take one step.

        Args:
            x: float32 [batch, inputs].
            labels: the classes.
            lr: the learning rate, a float32.
            alphas: of the sparse layers.
            temperature: T.

        Returns:
            the gradients of the thetas of the sparse layers, before the step.
        """
        batch, f = len(x), np.float32
        values = [x.T.astype(f)]
        for layer in self.layers:
            out = np.zeros((layer.rows, batch), f) if layer.bias is None else np.repeat(layer.bias[:, None], batch, 1)
            row, column = layer.where
            for b in range(batch):
                sums = out[:, b].copy()
                np.add.at(sums, row, layer.weights * values[-1][column, b])
                out[:, b] = sums
            values.append(out if layer is self.layers[-1] else np.maximum(out, f(0)))
        logits = values[-1]
        powers = exp(logits - logits.max(0))
        sums = np.zeros(batch, f)
        for power in powers:
            sums = sums + power
        delta = powers / sums
        delta[labels, np.arange(batch)] -= f(1)
        if batch > 1:
            delta = delta / f(batch)
        gradients: list[np.ndarray] = []
        for i in range(len(self.layers) - 1, -1, -1):
            layer, inputs = self.layers[i], values[i]
            row, column = layer.where
            before = np.zeros_like(inputs)
            gradient = np.zeros(len(row), f)
            for b in range(batch):
                gradient = gradient + delta[row, b] * inputs[column, b]
                sums = before[:, b].copy()
                np.add.at(sums, column, layer.weights * delta[row, b])
                before[:, b] = sums
            if layer.dense is not None:
                layer.dense = layer.dense - (f(lr) * gradient).reshape(layer.dense.shape)
            else:
                gradients.insert(0, gradient * layer.signs)
                layer.theta = layer.theta - f(lr) * gradients[0]
            if layer.bias is not None:
                total = np.zeros(layer.rows, f)
                for b in range(batch):
                    total = total + delta[:, b]
                layer.bias = layer.bias - f(lr) * total
            delta = np.where(inputs > 0, before, f(0))
        for layer, alpha in zip([layer for layer in self.layers if layer.dense is None], alphas, strict=True):
            self._drift(layer, lr, alpha, temperature)
            self._rewire(layer)
        return gradients

    def _drift(self, layer: OracleLayer, lr: float, alpha: float, temperature: float) -> None:
        layer.theta = layer.theta - np.float32(float(np.float32(lr)) * alpha)
        slots = np.arange(len(layer.theta))
        if temperature:
            nu = normal(key(self.seed, NOISE, layer.step), layer.index * 2**40 + slots)
            layer.theta = layer.theta + (nu * math.sqrt(2 * float(np.float32(lr)) * temperature)).astype(np.float32)
        if self.narrow:
            words = bits(key(self.seed, ROUND, layer.step), layer.index * 2**40 + slots // 4)
            draws = (words >> (slots % 4 * 16).astype(np.uint64)) & np.uint64(0xFFFF)
            sums = layer.theta / QUANTUM + draws.astype(np.float32) * np.float32(2.0**-16)
            rounded = np.minimum(np.trunc(sums), 32766).astype(np.float32) * QUANTUM
            layer.theta = np.where(layer.theta < 0, layer.theta, rounded)

    def _rewire(self, layer: OracleLayer) -> None:
        total, died = layer.rows * layer.columns, np.flatnonzero(layer.theta < 0)
        dormant = set(died.tolist())
        occupied = {place for slot, place in enumerate(layer.places.tolist()) if slot not in dormant}
        layer.reborn.append(len(died))
        if 2 * len(layer.theta) > total:
            free = np.array([place for place in range(total) if place not in occupied])
            hashes = bits(key(self.seed, BIRTH, layer.step, 0), layer.index * 2**40 + free).astype(np.int64)
            layer.places[died] = free[np.argsort(hashes, kind="stable")[: len(died)]]
        else:
            waiting, attempt = died, 0
            while len(waiting):
                words = bits(key(self.seed, BIRTH, layer.step, attempt), layer.index * 2**40 + waiting)
                still = []
                for slot, word in zip(waiting.tolist(), words.tolist(), strict=True):
                    draw = word % 2**63
                    if draw >= 2**63 // total * total or draw % total in occupied:
                        still.append(slot)
                        continue
                    occupied.add(draw % total)
                    layer.places[slot] = draw % total
                waiting, attempt = np.array(still, np.int64), attempt + 1
        layer.theta[died] = 0.0
        layer.step += 1
