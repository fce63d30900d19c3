"""Every tensor of the tests is small: a second thread costs more than it brings, above all beside other work."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import torch

torch.set_num_threads(1)

# programs that the tests run: Triton has to be told of its interpreter before it is imported, and is not everywhere
collect_ignore = (
    [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/triton_interpreted.py", "kernels/triton_compiled.py"]
)
