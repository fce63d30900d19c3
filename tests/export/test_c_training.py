"""The exported program that trains takes the steps of Algorithm 1: those of NumPy, bit by bit, and the package's places."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import LinearDecay, sparsify
from lightning_deepr.algorithm.steering import TurnoverTarget
from lightning_deepr.export import to_c
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.c_training import QUANTUM, WARNINGS, Oracle, OracleLayer, Program, needs_cc
from tests.helpers.plain import PlainDeepR

pytestmark = [needs_cc, pytest.mark.filterwarnings("ignore:.* is an int and means one single connection")]

SEED = 3


def digits() -> tuple[np.ndarray, np.ndarray]:
    images, labels, _, _ = embedded_digits()
    return images.flatten(1).numpy(), labels.numpy()


def lenet(connectivity: Any = 0.01, seed: int = SEED, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return sparsify(LeNet300100(), connectivity, seed=seed, **options)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def oracle_of(net: nn.Module, seed: int = SEED, narrow: bool = False) -> Oracle:
    """The oracle's network at the same state."""
    converted = {one.module: one for one in converted_tensors(net)}
    layers = []
    for module in net.modules():
        if not isinstance(module, nn.Linear):
            continue
        bias = None if module.bias is None else module.bias.detach().numpy().copy()
        none = np.zeros(0, np.int64)
        if module not in converted:
            weight = module.weight.detach().numpy().copy()
            layers.append(OracleLayer(*weight.shape, none.astype(np.float32), none, bias, dense=weight))
            continue
        one = converted[module]
        theta: np.ndarray = one.theta.detach().numpy().copy()
        if narrow:
            theta = np.rint(theta / QUANTUM).astype(np.float32) * QUANTUM
        slots: Any = one.slots
        layers.append(
            OracleLayer(
                slots.rows,
                slots.columns,
                theta,
                slots.places.numpy().copy(),
                bias,
                slots.index,
                slots.sign_seed,
                1 + slots.last_birth(),
                frozenset(slots.exceptions.tolist()),
            )
        )
    return Oracle(layers, seed, narrow)


def same(program: Program, oracle: Oracle) -> bool:
    """Whether all places are equal, and all thetas and signs bit by bit."""
    for i, layer in enumerate(oracle.layers):
        if layer.dense is None:
            places, weights = program.connections(i, len(layer.theta))
            wanted = layer.theta * layer.signs
            if not (np.array_equal(places, layer.places) and np.array_equal(weights.view("u4"), wanted.view("u4"))):
                return False
    return True


class RoundedSGD(torch.optim.Optimizer):
    """SGD that rounds the product and the difference, where torch's own kernel may round once."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * group["lr"])


def batches(batch: int, steps: int) -> Any:
    x, y = digits()
    for step in range(steps):
        i = np.arange(step * batch, (step + 1) * batch) % len(x)
        yield step, x[i], y[i]


VARIANTS: dict[str, dict[str, Any]] = {
    "batch_1": {},
    "batch_4_with_noise": {"batch": 4, "temperature": 1e-9},
    "int16": {"theta": "int16"},
    "int16_batch_2_with_noise": {"theta": "int16", "batch": 2, "temperature": 1e-8},
    "strong_prior": {"l1": 0.01},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_numpy_has_the_same_bits_at_every_step(variant: str, tmp_path: Path) -> None:
    options = {"l1": 1e-4, **VARIANTS[variant]}
    net = lenet()
    to_c(net, tmp_path, train=True, **options)
    program, oracle = Program(tmp_path, "-O3"), oracle_of(net, narrow=options.get("theta") == "int16")
    program.start(SEED)
    for step, x, y in batches(program.batch, 60):
        program.train(x, y, 0.05)
        oracle.step(x.astype(np.float32) / np.float32(255), y, 0.05, [options["l1"]] * 3, options.get("temperature", 0.0))
        assert same(program, oracle), step
    assert sum(sum(layer.reborn) for layer in oracle.layers) > 20


NETWORKS: dict[str, Any] = {
    "dense_output": lambda: sparsify(mlp(784, 20, 10), {"0": 0.05}),
    "dense_input": lambda: sparsify(mlp(784, 6, 10), {"2": 0.5}),
    "no_biases": lambda: sparsify(mlp(784, 20, 10, bias=False), 0.1),
    "more_than_half": lambda: sparsify(mlp(784, 20, 10), {"0": 0.02, "2": 0.8}),
    "all_connections": lambda: sparsify(mlp(784, 4, 10), 1.0),
    "one_connection": lambda: sparsify(mlp(784, 20, 10), {"0": 1, "2": 50}),
    "empty_rows": lambda: sparsify(mlp(784, 60, 10), {"0": 30, "2": 15}),
    "one_layer": lambda: sparsify(mlp(784, 10), 0.1),
    "own_signs": lambda: sparsify(mlp(784, 20, 10), 0.1, init="largest"),
    "long": lambda: sparsify(mlp(784, 12, 30, 9, 25, 10), {"0": 0.05, "2": 0.3, "4": 0.3, "6": 0.4, "8": 0.5}),
}


FIRST = ("dense_output", "more_than_half", "all_connections", "empty_rows", "own_signs")


@pytest.mark.parametrize(
    "network", [*FIRST, *(pytest.param(one, marks=pytest.mark.slow) for one in NETWORKS if one not in FIRST)]
)
def test_every_kind_of_network_has_the_same_bits(network: str, tmp_path: Path) -> None:
    net = NETWORKS[network]()
    batch = 1 + len(network) % 2
    made: Any = to_c(net, tmp_path, train=True, l1=0.05, batch=batch)
    program, oracle = Program(tmp_path), oracle_of(net, seed=7)
    assert program.net_bytes == made.net_bytes
    program.start(7)
    for step, x, y in batches(batch, 40):
        program.train(x, y, 0.1)
        sparse = sum(layer.dense is None for layer in oracle.layers)
        oracle.step(x.astype(np.float32) / np.float32(255), y, 0.1, [0.05] * sparse)
        assert same(program, oracle), step
    assert sum(sum(layer.reborn) for layer in oracle.layers) > 0


def beside_the_package(net: nn.Module, folder: Path, steps: int, total: int, l1: Any, batch: int) -> list[int]:
    """Train in C, in NumPy and in the package; the package gets its gradients from NumPy, whose sums have C's order.

    Returns:
        how many slots of each layer were reborn.
    """
    to_c(net, folder, train=True, l1=l1, batch=batch)
    program, oracle = Program(folder), oracle_of(net)
    program.start(SEED)
    lr = float(np.float32(0.05))
    converted = list(converted_tensors(net))
    optimizer = RoundedSGD([one.theta for one in converted], lr)
    callback = PlainDeepR(l1=l1, seed=SEED)
    rewiring = callback.attach(net, optimizer, total_steps=total)
    for step, x, y in batches(batch, steps):
        done = step + 1 if callback.tracked[0].is_steered else step
        program.train(x, y, lr, done / total)
        alphas = [
            t.steering.alpha if t.steering is not None and t.steering.alpha else l1(step / total) if callable(l1) else 1e-4
            for t in callback.tracked
        ]
        gradients = oracle.step(x.astype(np.float32) / np.float32(255), y, lr, alphas)
        for one, gradient in zip(converted, gradients, strict=True):
            one.theta.grad = torch.from_numpy(gradient)
        optimizer.step()
        assert same(program, oracle), step
        for one, layer in zip(converted, oracle.layers, strict=True):
            assert np.array_equal(one.slots.places.numpy(), layer.places), step  # type: ignore[union-attr]
            assert np.array_equal(one.theta.detach().numpy(), layer.theta), step
    rewiring.remove()
    assert program.check() == 0
    return [sum(layer.reborn) for layer in oracle.layers]


@pytest.mark.parametrize(
    ("l1", "batch", "total"),
    [
        ("auto", 1, 400),
        pytest.param(TurnoverTarget(0.2, shape="linear", interval=25), 2, 400, marks=pytest.mark.slow),
        (LinearDecay(2e-4), 1, 256),
    ],
    ids=["auto", "linear_turnover", "linear_decay"],
)
def test_the_package_takes_the_same_places(l1: Any, batch: int, total: int, tmp_path: Path) -> None:
    reborn = beside_the_package(lenet(), tmp_path, 110, total, l1, batch)
    assert min(reborn) > 0


@pytest.mark.slow
def test_2000_steps_take_the_same_places(tmp_path: Path) -> None:
    assert min(beside_the_package(lenet(2662, distribution="deepr"), tmp_path, 2000, 3200, "auto", 1)) > 1000


def trained(steps: int = 25) -> nn.Module:
    """A network that the package has trained a little."""
    net = lenet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = PlainDeepR(l1=1e-3, seed=SEED).attach(net, optimizer, total_steps=steps)
    for _, x, y in batches(8, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.from_numpy(x).float() / 255), torch.from_numpy(y)).backward()
        optimizer.step()
    rewiring.remove()
    return net


def test_a_trained_network_continues_where_it_was(tmp_path: Path) -> None:
    net = trained()
    assert min(one.slots.last_birth() for one in converted_tensors(net)) > 10
    x, _ = digits()
    to_c(net, tmp_path / "x", train=True)
    program = Program(tmp_path / "x")
    program.start(0)
    wanted = net.eval()(torch.from_numpy(x[:200]).float() / 255).argmax(1).tolist()
    assert [program.predict(one) for one in x[:200]] == wanted
    assert min(beside_the_package(net, tmp_path / "y", 60, 400, "auto", 1)) > 0


def test_an_untrained_program_starts_as_sparsify_on_the_meta_device(tmp_path: Path) -> None:
    to_c(trained(), tmp_path, train=True, untrained=True)
    program = Program(tmp_path)
    for seed in (0, 5, 2**32 - 1):
        program.start(seed)
        with torch.device("meta"):
            net = LeNet300100()
        net = sparsify(net, 0.01, seed=seed, device="cpu")
        for i, one in enumerate(converted_tensors(net)):
            places, weights = program.connections(i, one.slots.count)  # type: ignore[union-attr]
            assert np.array_equal(places, one.slots.places.numpy())  # type: ignore[union-attr]
            assert np.array_equal(weights, (one.theta * one.slots.signs).detach().numpy())  # type: ignore[operator]
    oracle = oracle_of(net, seed=seed)
    for layer in oracle.layers:
        layer.bias = np.zeros(layer.rows, np.float32)
    for step, x, y in batches(1, 30):
        program.train(x, y, 0.05)
        oracle.step(x.astype(np.float32) / np.float32(255), y, 0.05, [1e-4] * 3)
        assert same(program, oracle), step


@pytest.mark.slow
def test_autograd_trains_alike(tmp_path: Path) -> None:
    """Under the package's own forward and backward the sums round in another order: equal in distribution."""
    net = lenet()
    to_c(net, tmp_path, train=True, batch=10, l1=2e-4)
    program = Program(tmp_path)
    program.start(SEED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    callback = PlainDeepR(l1=2e-4, seed=SEED)
    rewiring = callback.attach(net, optimizer, total_steps=2000)
    mine, theirs, equal = [], [], []
    for step, x, y in batches(10, 2000):
        mine.append(program.train(x, y, 0.2))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.from_numpy(x).float() / 255), torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        theirs.append(float(loss))
        if step < 50:
            one = next(converted_tensors(net))
            equal.append(float(np.mean(program.connections(0, one.slots.count)[0] == one.slots.places.numpy())))
    rewiring.remove()
    assert np.allclose(mine[:20], theirs[:20], rtol=1e-4)
    assert min(equal[:10]) == 1 and min(equal) > 0.99
    assert abs(np.mean(mine[-500:]) - np.mean(theirs[-500:])) < 0.03
    x, y = digits()
    x, y = x[:2000], y[:2000]
    accuracy = np.mean([program.predict(one) == label for one, label in zip(x, y, strict=True)])
    theirs_accuracy = float((net(torch.from_numpy(x).float() / 255).argmax(1) == torch.from_numpy(y)).float().mean())
    assert accuracy > 0.75  # 20,000 digits, alpha and learning rate constant
    assert abs(accuracy - theirs_accuracy) < 0.015


# -- the program itself -------------------------------------------------------------------------------------------------------

NEWLIB = ["-isystem", "/usr/include/newlib"]  # Debian's libnewlib-arm-none-eabi
COMPILERS = {
    "gcc": ["gcc"],
    "clang": ["clang"],
    "gcc_m32": ["gcc", "-m32"],
    "cortex_m4f": ["arm-none-eabi-gcc", "-mthumb", "-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"],
    "cortex_m0plus": ["arm-none-eabi-gcc", "-mthumb", "-mcpu=cortex-m0plus"],
    "clang_cortex_m4f": ["clang", "--target=thumbv7em-none-eabihf", "-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", *NEWLIB],
    "clang_cortex_m0plus": ["clang", "--target=thumbv6m-none-eabi", "-mcpu=cortex-m0plus", *NEWLIB],
}
EVERY_OPTION: list[dict[str, Any]] = [
    {},
    {"batch": 3, "untrained": True, "l1": LinearDecay(1e-3), "temperature": 1e-9, "inputs": "float"},
    {"theta": "int16", "untrained": True, "l1": TurnoverTarget(shape="constant"), "prefix": "tiny"},
]


@pytest.mark.parametrize(
    "compiler", ["gcc", "clang", *(pytest.param(one, marks=pytest.mark.slow) for one in list(COMPILERS)[2:])]
)
def test_compilers_have_nothing_to_say(compiler: str, tmp_path: Path) -> None:
    command = COMPILERS[compiler]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on this machine")
    (tmp_path / "empty.c").write_text("#include <stdint.h>\n#include <string.h>\nint32_t none;\n")
    probe = subprocess.run(
        [*command, "-c", "-o", "empty.o", "empty.c"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    if re.search(r"fatal error: \S+\.h: No such file|fatal error: '\S+\.h' file not found", probe.stderr):
        pytest.skip(f"{' '.join(command)} has no headers for this target")
    assert probe.returncode == 0, probe.stderr
    nets = [sparsify(mlp(50, 20, 10), {"0": 0.1, "2": 0.8}), NETWORKS["dense_output"](), NETWORKS["own_signs"]()]
    for net, options in zip(nets, EVERY_OPTION, strict=True):
        made: Any = to_c(net, tmp_path, train=True, **options)
        done = subprocess.run(
            [*command, *WARNINGS, "-O2", "-DDEEPR_CHECK", "-c", "-o", "net.o", made.source.name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")


MAIN = """\
#include "deepr_net.h"
static deepr_net net;
static deepr_input x[DEEPR_BATCH * DEEPR_INPUTS];
static uint8_t state[DEEPR_STATE_BYTES];
int main(void)
{
    uint16_t labels[DEEPR_BATCH];
    uint32_t step, k, word = 1;
    float loss = 0.0f;
    deepr_init(&net, 1);
    for (step = 0; step < 400; step++) {
        for (k = 0; k < DEEPR_BATCH * DEEPR_INPUTS; k++) {
            word = word * 1664525u + 1013904223u;
            x[k] = (deepr_input)(word >> 30 == 0 ? word >> 24 & 127u : 0u);
        }
        for (k = 0; k < DEEPR_BATCH; k++)
            labels[k] = (uint16_t)(x[k * DEEPR_INPUTS] % DEEPR_OUTPUTS);
        loss = deepr_train_step(&net, x, labels, 0.05f, (float)step / 400.0f);
        if (!(loss >= 0.0f) || deepr_predict(&net, x) < 0)
            return 1;
        if (step % 100 == 0 && (deepr_save(&net, state, sizeof state) == 0 || deepr_load(&net, state, sizeof state) != 0))
            return 2;
    }
    return deepr_check(&net);
}
"""


@pytest.mark.parametrize("options", [{"batch": 5, "untrained": True, "temperature": 1e-9}, {"theta": "int16"}], ids=str)
def test_sanitizers_find_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    net = sparsify(mlp(60, 40, 10), {"0": 0.1, "2": 0.7})
    to_c(net, tmp_path, train=True, **options)
    (tmp_path / "main.c").write_text(MAIN)
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    # the sanitizers' libraries are a package of their own; a program without anything of ours tells whether they are there
    probe = subprocess.run(
        ["cc", *sanitizers, "-o", "empty", "empty.c"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    if re.search(r"cannot find .*(asan|ubsan|clang_rt)", probe.stderr):
        pytest.skip("the compiler has no sanitizers")
    assert probe.returncode == 0, probe.stderr
    flags = ["-O1", "-g", *sanitizers, "-DDEEPR_CHECK", *WARNINGS]
    compiled = subprocess.run(
        ["cc", *flags, "-o", "main", "main.c", "deepr_net.c"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("connectivity", "options", "limit"),
    [(2662, {}, 32_768), (2662, {"batch": 10}, 65_536), (1331, {}, 20_480), (2662, {"theta": "int16"}, 24_576)],
    ids=["1_percent", "batch_10", "half_a_percent", "int16"],
)
def test_memory_fits(connectivity: int, options: dict[str, Any], limit: int, tmp_path: Path) -> None:
    made: Any = to_c(lenet(connectivity, distribution="deepr"), tmp_path, train=True, ram=limit, **options)
    assert Program(tmp_path).net_bytes == made.net_bytes
    theta = 2 if options.get("theta") == "int16" else 4
    assert made.parts["theta"] == theta * connectivity
    assert made.parts["places"] <= 4 * connectivity
    inputs = 784 * options.get("batch", 1)
    assert made.net_bytes + made.stack_bytes + inputs + 2 * options.get("batch", 1) <= limit
    (tmp_path / "empty.c").write_text("int one(void) { return 1; }\n")
    with_usage = ["cc", "-O2", "-std=c99", "-fstack-usage", "-c"]
    subprocess.run([*with_usage, "-o", "empty.o", "empty.c"], cwd=tmp_path, capture_output=True, timeout=60)
    if not list(tmp_path.glob("*.su")):
        pytest.skip("the bytes of the network were checked; the compiler does not say how much stack a function uses")
    subprocess.run([*with_usage, "-o", "net.o", "deepr_net.c"], cwd=tmp_path, check=True, timeout=120)
    (used,) = [path for path in tmp_path.glob("*.su") if "empty" not in path.name]
    sizes = {line.split(":")[-1].split("\t")[0]: int(line.split("\t")[1]) for line in used.read_text().splitlines()}
    # no function calls more than two others in turn, and none takes much
    deepest = sizes.pop("deepr_train_step") + sum(sorted(sizes.values())[-2:])
    assert deepest <= made.stack_bytes


# -- states -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"theta": "int16", "batch": 2, "l1": 1e-4}], ids=str)
def test_a_saved_state_continues(options: dict[str, Any], tmp_path: Path) -> None:
    to_c(lenet(), tmp_path, train=True, **options)
    program = Program(tmp_path)
    program.start(9)
    steps = list(batches(program.batch, 130))
    for _, x, y in steps[:70]:
        program.train(x, y, 0.05, 0.25)
    state = program.save()
    assert len(state) == program.state_bytes
    for _, x, y in steps[70:]:
        program.train(x, y, 0.05, 0.5)
    wanted = program.save()
    program.start(1)  # another seed: the state has its own
    assert program.load(state) == 0
    assert program.save() == state
    for _, x, y in steps[70:]:
        program.train(x, y, 0.05, 0.5)
    assert program.save() == wanted


def test_a_foreign_or_damaged_state_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    to_c(lenet(), tmp_path / "mine", train=True)
    others = {
        "connections": (lenet(0.02), {}),
        "seed": (lenet(seed=4), {}),
        "type": (lenet(), {"theta": "int16"}),
        "untrained": (lenet(), {"untrained": True}),
    }
    program = Program(tmp_path / "mine")
    program.start(0)
    state = program.save()
    for name, (net, options) in others.items():
        to_c(net, tmp_path / name, train=True, **options)
        other = Program(tmp_path / name)
        other.start(0)
        assert program.load(other.save()) != 0, name
    for cut in (0, 1, 11, 100, len(state) - 1):
        assert program.load(state[:cut]) != 0
    for at in (0, 5, 9, 20, 40, 5000, len(state) - 1):
        damaged = bytearray(state)
        damaged[at] ^= 4
        assert program.load(bytes(damaged)) != 0
    assert program.save() == state
    assert program.save(len(state) - 1) == b""


def test_bad_labels_inputs_and_rates_are_refused_and_change_nothing(tmp_path: Path) -> None:
    to_c(lenet(), tmp_path, train=True, inputs="float", batch=2)
    program = Program(tmp_path)
    program.start(0)
    before = program.save()
    x = np.zeros((2, 784), np.float32)
    assert program.train(x, [3, 10], 0.1) == -1
    assert program.train(x, [65_535, 0], 0.1) == -1
    for lr in (-0.1, float("nan"), float("inf")):
        assert program.train(x, [3, 4], lr) == -1
    for progress in (-0.1, 1.1, float("nan")):
        assert program.train(x, [3, 4], 0.1, progress) == -1
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[1, 700] = bad
        assert program.train(x, [3, 4], 0.1) == -1
        assert program.predict(x[1]) == -1
    assert program.save() == before
    x[1, 700] = 0.5
    assert program.train(x, [3, 4], 0.1) > 0


# -- refusals of the export ---------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0])


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "convolution": (
        lambda: sparsify(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), 0.5),
        {},
        r"`0` \(Conv2d",
    ),
    "gru": (lambda: sparsify(Recurrent(), 0.5), {}, r"`gru` \(GRU\).*--submodule"),
    "dense": (lambda: mlp(5, 4, 2), {}, "found none: convert the network first"),
    "relu_at_the_end": (lambda: sparsify(nn.Sequential(nn.Linear(5, 4), nn.ReLU()), 0.5), {}, "expected logits"),
    "softmax": (lambda: sparsify(nn.Sequential(nn.Linear(5, 4), nn.Softmax(1)), 0.5), {}, "Softmax"),
    "rows": (lambda: sparsify(nn.Sequential(nn.Linear(3, 65_536)), 9), {}, "`0` has 65,536 rows, expected at most 65,535"),
    "columns": (lambda: sparsify(nn.Sequential(nn.Linear(65_536, 3)), 9), {}, "65,536 columns"),
    "shared": (lambda: sparsify(mlp(50, 20, 5), 0.2, scope="global"), {}, 'scope="global"'),
    "batch": (lambda: sparsify(mlp(5, 4, 2), 0.5), {"batch": 0}, "batch: expected a number from 1"),
    "l1": (lambda: sparsify(mlp(5, 4, 2), 0.5), {"l1": float("nan")}, "l1: expected finite"),
    "temperature": (lambda: sparsify(mlp(5, 4, 2), 0.5), {"temperature": -1.0}, "temperature"),
    "theta": (lambda: sparsify(mlp(5, 4, 2), 0.5), {"theta": "int8"}, 'expected "float32" or "int16"'),
    "prefix": (lambda: sparsify(mlp(5, 4, 2), 0.5), {"prefix": "2x"}, "C identifier"),
    "ram": (lenet, {"ram": 20_000}, r"needs 24,\d+ bytes .* At most 2,0\d\d connections fit, a connectivity of 0.007"),
    "no_ram": (lenet, {"ram": 4000}, "No connectivity fits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_and_why(case: str, tmp_path: Path) -> None:
    make, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        to_c(make(), tmp_path / "out", train=True, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"batch": 1.5}, {"batch": True}, {"l1": "often"}, {"l1": None}, {"ram": "8k"}], ids=str)
def test_arguments_of_other_types_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"to_c: {next(iter(options))}"):
        to_c(lenet(), tmp_path / "out", train=True, **options)


def test_what_the_ram_message_says_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="connections fit") as caught:
        to_c(lenet(), tmp_path, train=True, ram=20_000)
    fits = int(str(caught.value).split("At most ")[1].split()[0].replace(",", ""))
    to_c(lenet(fits), tmp_path, train=True, ram=20_000)
