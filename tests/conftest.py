"""Settings of all tests. Their tensors are small, so a second thread costs more time than it saves."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the processes that tests start inherit it

import torch

torch.set_num_threads(1)

# Tests run these as programs: Triton reads the setting for its interpreter when it is imported, and may not be installed.
collect_ignore = (
    [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/triton_interpreted.py", "kernels/triton_compiled.py"]
)
