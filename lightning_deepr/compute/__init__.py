"""How a layer with K connections is computed."""

from lightning_deepr.compute.dense import build_weight

COMPUTE = ("auto", "dense")


def check_compute(compute: str) -> str:
    """Validate the ``compute`` argument and resolve "auto" (dense: the only backend of this version)."""
    if compute == "sparse":
        raise ValueError('compute="sparse" is not in this version of lightning-deepr: use "auto" or "dense".')
    if compute not in COMPUTE:
        raise ValueError(f'compute: expected one of "auto", "dense", found {compute!r}.')
    return "dense"


__all__ = ["build_weight", "check_compute"]
