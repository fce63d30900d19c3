"""Messages of rank 0, by the library that both packages use. They go to the log of the package that is imported."""

from __future__ import annotations

import os

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn"]

if not hasattr(rank_zero_only, "rank"):  # neither package is imported yet: they set it in the same way, and keep what is set
    _given = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    rank_zero_only.rank = next((int(rank) for rank in _given if rank is not None), 0)  # type: ignore[attr-defined]
