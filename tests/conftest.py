"""Every tensor of the tests is small: a second thread costs more than it brings, above all beside other work."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import torch

torch.set_num_threads(1)
