"""Operations are counted by connections: torch's counter, Lightning's measure_flops and the summary of a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import DeviceStatsMonitor
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_deepr import DeepR, sparsify
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.optimizers import sgd
from tests.helpers.regression import Regression
from tests.helpers.trainer import trainer

BATCH = 5


class Net(LightningModule):
    def __init__(self, connectivity: float | None = 0.1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 64))
        self.example_input_array = torch.randn(BATCH, 3, 6, 6, dtype=dtype)
        if connectivity is not None:
            sparsify(self.net, connectivity, distribution="uniform", compute="sparse")
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def expected(net: nn.Module) -> list[int]:
    """Return 2 operations per connection, element of the batch and pixel."""
    conv, linear = (one.slots.count for one in converted_tensors(net))
    return [2 * BATCH * conv * 36, 2 * BATCH * linear]


@pytest.mark.feature("Others: measure_flops and ModelSummary count connections")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_operations_are_counted_by_connections(dtype: torch.dtype) -> None:
    module = Net(dtype=dtype)
    conv, linear = expected(module)
    x = module.example_input_array
    assert measure_flops(module, lambda: module(x)) == conv + linear
    # backward: the gradient of theta, and of the inputs of all layers but the first
    with pytest.warns(UserWarning, match="no callback rewires it"):
        both = measure_flops(module, lambda: module(x), lambda y: y.float().sum())
    assert both == (conv + linear) + (conv + 2 * linear)
    summary = ModelSummary(module, max_depth=2)
    by_name = dict(
        zip(summary.layer_names, zip(summary.in_sizes, summary.out_sizes, summary.param_nums, strict=True), strict=True)
    )
    sizes_in, sizes_out, count = by_name["net.3"]
    assert (sizes_in, sizes_out) == ([BATCH, 720], [BATCH, 64])
    assert count == module.net[3].bias.numel() + list(converted_tensors(module))[1].slots.count  # type: ignore[union-attr, operator]
    flops: Any = summary.flop_counts
    assert sum(next(found for name, found in flops.items() if name.endswith("net.3")).values()) == linear


def test_a_dense_layer_is_counted_as_before() -> None:
    module = Net(None)
    assert measure_flops(module, lambda: module(module.example_input_array)) == 2 * BATCH * (20 * 27 * 36 + 720 * 64)


FIRST = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from lightning_deepr import sparsify
net = sparsify(torch.nn.Linear(40, 30), 0.1, compute="sparse")
for _ in range(2):  # the counter at work when the first layer runs took its copy of the formulas before
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(5, 40))
    print(counter.get_total_flops())
"""


@pytest.mark.slow
def test_the_first_counter_of_a_process_counts() -> None:
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1200", "1200"]


def test_counting_changes_no_result() -> None:
    module = Net()
    x = module.example_input_array
    with FlopCounterMode(display=False):
        counted = module(x)
    assert torch.equal(counted, module(x))


@pytest.mark.feature("Others: DeviceStatsMonitor")
def test_device_stats_are_logged(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    module = Regression(sgd)
    trainer(DeepR(0.3, log_every_n_steps=5), DeviceStatsMonitor(cpu_stats=True), logger=logger, log_every_n_steps=5).fit(module)
    header = Path(logger.experiment.metrics_file_path).read_text().splitlines()[0]
    assert "cpu_percent" in header and "turnover" in header
