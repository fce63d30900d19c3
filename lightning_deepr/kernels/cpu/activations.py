"""Sigmoid and tanh of vectors in registers, for the cells of recurrent layers."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from lightning_deepr.kernels.cpu.native import _Tile


class Math:
    """Functions of the vectors of a tile, accurate to a few units in the last place. NaN stays NaN."""

    def __init__(self, builder: Any, tile: _Tile) -> None:
        self.builder, self.tile = builder, tile
        single = tile.size == 4
        self.integer = ir.VectorType(ir.IntType(8 * tile.size), tile.lanes)
        self.digits, self.bias = (23, 127) if single else (52, 1023)
        # ln 2 = high + low; high has so few digits that n * high is exact
        self.high, self.low = (0.693359375, -2.12194440054690583e-4) if single else (0.693145751953125, 1.4286068203094173e-6)
        self.order = 7 if single else 13  # the degree of the Taylor polynomial of exp, for |x| <= ln(2) / 2
        self.largest = 87.0 if single else 708.0
        self.flat = 20.0 if single else 40.0  # tanh(x / 2) rounds to 1 from here on

    def constant(self, value: float) -> Any:
        return ir.Constant(self.tile.vector, [value] * self.tile.lanes)

    def integers(self, value: int) -> Any:
        return ir.Constant(self.integer, [value] * self.tile.lanes)

    # The flag "contract" lets a multiplication and an addition become one instruction. The flag "fast" would also remove the
    # rounding that adds and subtracts a large number.
    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def subtract(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=("contract",))

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def one_minus(self, a: Any) -> Any:
        return self.subtract(self.constant(1.0), a)

    def clamp(self, x: Any, bound: float) -> Any:
        for limit, compared in ((bound, ">"), (-bound, "<")):
            beyond = self.builder.fcmp_ordered(compared, x, self.constant(limit))
            x = self.builder.select(beyond, self.constant(limit), x)
        return x

    def _reduced(self, x: Any) -> tuple[Any, Any]:
        """Compute s = 2^n and p such that exp(x) = s (1 + p) and |p| < 0.42."""
        rounding = self.constant(1.5 * 2.0**self.digits)  # its last digit is worth 1: the low bits of the sum are n
        shifted = self.builder.fadd(self.builder.fmul(x, self.constant(1 / math.log(2))), rounding)
        n = self.builder.fsub(shifted, rounding)
        r = self.subtract(x, self.multiply(n, self.constant(self.high)))
        r = self.subtract(r, self.multiply(n, self.constant(self.low)))
        q = self.constant(1 / math.factorial(self.order))
        for k in range(self.order - 1, 1, -1):
            q = self.add(self.multiply(q, r), self.constant(1 / math.factorial(k)))
        p = self.add(self.multiply(self.multiply(r, r), q), r)
        bits = self.builder.add(self.builder.bitcast(shifted, self.integer), self.integers(self.bias))
        return self.builder.bitcast(self.builder.shl(bits, self.integers(self.digits)), self.tile.vector), p

    def sigmoid(self, x: Any) -> Any:
        s, p = self._reduced(self.clamp(self.builder.fneg(x), self.largest))
        return self.builder.fdiv(self.constant(1.0), self.add(self.constant(1.0), self.add(self.multiply(s, p), s)))

    def tanh(self, x: Any) -> Any:
        s, p = self._reduced(self.clamp(self.add(x, x), self.flat))
        e = self.add(self.multiply(s, p), self.subtract(s, self.constant(1.0)))  # exp(2x) - 1, accurate near 0
        return self.builder.fdiv(e, self.add(e, self.constant(2.0)))


def blocks(builder: Any, address: Any, stride: Any, count: int = 4) -> list[Any]:
    """Compute the addresses of the gates of a unit, which are ``stride`` bytes apart."""
    return [builder.add(address, builder.mul(stride, ir.Constant(ir.IntType(64), k))) for k in range(count)]
