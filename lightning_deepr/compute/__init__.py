"""Compute a layer with K connections: with a transient dense weight, or from its connections alone."""

from lightning_deepr.compute.dense import build_weight

COMPUTE = ("auto", "dense", "sparse", "tune")


def check_compute(compute: str) -> str:
    """Validate the ``compute`` argument."""
    if compute not in COMPUTE:
        raise ValueError(f'compute: expected one of "auto", "dense", "sparse", "tune", found {compute!r}.')
    return compute


__all__ = ["build_weight", "check_compute"]
