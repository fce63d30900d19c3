"""Load mutated files of sparse models: each is refused with a clear error, or is a valid file.

    python -m tests.helpers.fuzz_format [COUNT] [SEED]

Half of the mutants are damaged at random positions (bits, bytes, length). They must be refused, unless nothing changed. The
other half are attacks: K, shapes, offsets, places, values or the record change, and the digest is right. They must be refused
with a ``FormatError``, or load as the network that the file describes. The test watches the address space (its limit is a
little above the present use), the resident set, the peak memory of Python and NumPy per file, and whether anything is imported,
compiled, executed or unpickled.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_deepr import connections, sparsify, zoo
from lightning_deepr.files import container
from lightning_deepr.models import BLSTMClassifier, LeNet300100

ROOM = 96 << 20  # bytes of address space above the use before the first mutant
EVENTS = ("exec", "compile", "import", "pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "ctypes.dlopen")
ODD_NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 7, 40, 41, 255, 2**31, 2**47, 2**48, 2**48 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308,
    True, None, "1", [], {},
)  # fmt: skip


def base_files(folder: Path) -> list[bytes]:
    """Make valid files: with and without exceptions, one of an LSTM, one with a connection at -0.0."""
    torch.manual_seed(0)
    plain = sparsify(LeNet300100(), 0.002)
    next(iter(plain.parameters())).data[:3] = 0.0
    signed = sparsify(LeNet300100(bias=False), 300, init="largest")
    signed.fc1.parametrizations.weight[0].exceptions = torch.arange(5, 2000, 7)  # most of them dormant
    recurrent = sparsify(BLSTMClassifier(inputs=5, hidden=8, classes=6), 0.1)
    nets = (plain, signed, recurrent)
    files = [zoo.save(net, folder / f"{i}.safetensors", algorithm="DeepR", seeds=[1, 2, 3]) for i, net in enumerate(nets)]
    return [file.read_bytes() for file in files]


# -- damage -----------------------------------------------------------------------------------------------------------------


def flip_bits(rng: random.Random, file: bytearray) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        file[rng.randrange(len(file))] ^= 1 << rng.randrange(8)
    return file


def truncate(rng: random.Random, file: bytearray) -> bytearray:
    return file[: rng.choice((rng.randrange(len(file)), rng.randrange(120), len(file) - 1))]


def extend(rng: random.Random, file: bytearray) -> bytearray:
    return file + rng.randbytes(rng.randrange(1, 50))


def overwrite(rng: random.Random, file: bytearray) -> bytearray:
    begin = rng.randrange(len(file))
    file[begin : begin + rng.randrange(1, 64)] = rng.choice((bytes(8), b"\xff" * 8, rng.randbytes(8), b"[" * 200))
    return file


def header_length(rng: random.Random, file: bytearray) -> bytearray:
    file[:8] = struct.pack(
        "<Q", rng.choice((0, 1, 8, len(file), len(file) - 8, 2**31, 2**63, 2**64 - 1, rng.randrange(len(file))))
    )
    return file


DAMAGE = (flip_bits, truncate, extend, overwrite, header_length)


# -- attacks, with a right digest --------------------------------------------------------------------------------------------


class Parts:
    """The parts of a file: header, record, data."""

    def __init__(self, file: bytes) -> None:
        length = struct.unpack("<Q", file[:8])[0]
        self.header = json.loads(file[8 : 8 + length])
        self.record = json.loads(self.header["__metadata__"]["record"])
        self.data = bytearray(file[8 + length :])
        self.text: str | None = None  # the text of the record, if it is not JSON

    def file(self) -> bytearray:
        metadata = self.header.get("__metadata__")
        if isinstance(metadata, dict) and "record" in metadata:
            metadata["record"] = json.dumps(self.record, separators=(",", ":")) if self.text is None else self.text
        header = json.dumps(self.header, separators=(",", ":")).encode()
        return signed(bytearray(struct.pack("<Q", len(header)) + header + self.data))

    def tensor(self, rng: random.Random, ending: str = "") -> tuple[str, dict[str, Any]]:
        names = [name for name in self.header if name != "__metadata__" and name.endswith(ending)]
        name = rng.choice(names)
        return name, self.header[name]


def signed(file: bytearray) -> bytearray:
    return container.sign(file) if len(file) >= container.DIGEST.stop else file


def entry_number(rng: random.Random, parts: Parts) -> None:
    """Change K, N, widths, seeds or shapes of a sparse tensor: negative, huge, of another type, off by one."""
    entry = parts.record["sparse"][rng.choice(list(parts.record["sparse"]))]
    key = rng.choice([*entry, "exceptions"])
    if key == "shape":
        shape(rng, entry)
    else:
        entry[key] = entry.get(key, 0) + rng.choice((-1, 1)) if rng.random() < 0.4 else rng.choice(ODD_NUMBERS)
    if rng.random() < 0.5 and all(type(e.get(k)) is int for e in parts.record["sparse"].values() for k in ("active", "total")):
        parts.record["connectivity"] = {k: sum(e[k] for e in parts.record["sparse"].values()) for k in ("active", "total")}


def consistent_count(rng: random.Random, parts: Parts) -> None:
    """Change K everywhere: in the shape of the values, the sums and the length of the data."""
    name = rng.choice(list(parts.record["sparse"]))
    entry, values = parts.record["sparse"][name], parts.header[f"{name}.values"]
    by = rng.choice((-1, 1, 2, -entry["active"]))
    begin, end = values["data_offsets"]
    parts.data[end:end] = bytes(4 * max(by, 0))
    del parts.data[end + 4 * min(by, 0) : end]
    values["shape"], values["data_offsets"] = [entry["active"] + by], [begin, end + 4 * by]
    for other in parts.header.values():
        if "data_offsets" in other and other is not values and other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset + 4 * by for offset in other["data_offsets"]]
    entry["active"] += by
    parts.record["connectivity"]["active"] += by


def shape(rng: random.Random, entry: dict[str, Any]) -> None:
    sizes = entry["shape"]
    if not sizes or rng.random() < 0.2:
        entry["shape"] = rng.choice(ODD_NUMBERS)
    elif rng.random() < 0.3:
        entry["shape"] = sizes + [rng.choice(ODD_NUMBERS)] * rng.choice((1, 20))
    else:
        sizes[rng.randrange(len(sizes))] = rng.choice(ODD_NUMBERS)
        if rng.random() < 0.3 and all(type(size) is int for size in sizes):
            entry["total"] = torch.Size([0]).numel() if 0 in sizes else abs(sizes[0] * sizes[-1])


def tensor_entry(rng: random.Random, parts: Parts) -> None:
    name, entry = parts.tensor(rng)
    what = rng.randrange(5)
    if what == 0:
        shape(rng, entry)
    elif what == 1:
        entry["dtype"] = rng.choice((*container.DTYPES, "F8_E4M3", "", None, 3))
    elif what == 2:
        entry["data_offsets"] = rng.choice(
            ([0, 0], [-4, 4], [0, 2**63], [1, 2, 3], None, [e + 1 for e in entry["data_offsets"]], ["0", "1"])
        )
    elif what == 3:
        del entry[rng.choice(list(entry))]
    else:
        parts.header[rng.choice((name + "x", "", "fc1.parametrizations.weight.0.places", "a" * 5000))] = parts.header.pop(name)


def places(rng: random.Random, parts: Parts) -> None:
    """Change gaps so that they lead beyond the last place, or end too soon or too late."""
    _, entry = parts.tensor(rng, ".gaps")
    begin, end = entry["data_offsets"]
    where = rng.randrange(begin, min(end, len(parts.data)))
    length = min(rng.choice((1, 4, 1000)), end - where)
    parts.data[where : where + length] = rng.choice((b"\xff", b"\0", rng.randbytes(1))) * length


def not_finite(rng: random.Random, parts: Parts) -> None:
    floats = [entry for name, entry in parts.header.items() if name != "__metadata__" and entry["dtype"] == "F32"]
    begin, end = rng.choice(floats)["data_offsets"]
    if begin < end:
        where = begin + 4 * rng.randrange((end - begin) // 4)
        parts.data[where : where + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), float("-inf"))))


def value_bits(rng: random.Random, parts: Parts) -> None:
    where = rng.randrange(len(parts.data))
    parts.data[where] ^= 1 << rng.randrange(8)


def record(rng: random.Random, parts: Parts) -> None:
    """Change the architecture, use arguments out of range, missing or extra keys, deep nesting, or text that is not JSON."""
    changes: tuple[Callable[[], Any], ...] = (
        lambda: parts.record.update(
            architecture=rng.choice(("os.system", "cifar10_cnn", "timit_blstm", "", None, 3, "x" * 5000))
        ),
        lambda: parts.record.update(
            arguments=rng.choice(({"hidden": 10**9}, {"layers": 10**9}, {"bias": "no"}, {"x": 1}, [], None, {"dropout": -1}))
        ),
        lambda: parts.record["arguments"].update(hidden=rng.choice(ODD_NUMBERS), layers=rng.choice((1, 2, 64))),
        lambda: parts.record.pop(rng.choice(list(parts.record))),
        lambda: parts.record.update({rng.choice([*parts.record, "more"]): rng.choice(ODD_NUMBERS)}),
        lambda: parts.record.update(metadata={"metrics": rng.choice(ODD_NUMBERS)}),
        lambda: parts.record["sparse"].pop(rng.choice(list(parts.record["sparse"]))),
        lambda: parts.record["sparse"].update({"fc9.weight": copy.deepcopy(next(iter(parts.record["sparse"].values())))}),
        lambda: parts.header["__metadata__"].update(version=rng.choice(("0", "2", "99999", "-1", "", "1.0", "x", "9" * 10**4))),
        lambda: parts.header["__metadata__"].update(format=rng.choice(("pt", "", "LIGHTNING-DEEPR"))),
        lambda: parts.header["__metadata__"].update(more="x"),
        lambda: parts.header["__metadata__"].update(sha256=3),
        lambda: parts.header.update(__metadata__=rng.choice(ODD_NUMBERS)),
        lambda: parts.header.update({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2000)}),
    )
    rng.choice(changes)()


def text(rng: random.Random, parts: Parts) -> bytearray:
    """Change the header's text: a duplicate name, NaN, endless nesting."""
    file = parts.file()
    length = struct.unpack("<Q", file[:8])[0]
    header = bytes(file[8 : 8 + length])
    changed = rng.choice(
        (
            lambda: header[:-1] + b',"__metadata__":{}}',
            lambda: header.replace(b'"shape":[', b'"shape":[NaN,', 1),
            lambda: header[:-1] + b',"x":' + b"[" * rng.choice((10, 100_000)),
            lambda: header[:-1] + b',"x":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
            lambda: header + b" " * rng.choice((1, 5 << 20)),
            lambda: header[:-1] + b',"\xff":1}',
            lambda: header.replace(b"\\", b"", 1),
            lambda: header[: rng.randrange(len(header))],
        )
    )()
    return signed(bytearray(struct.pack("<Q", len(changed)) + changed + file[8 + length :]))


ATTACKS = (entry_number, consistent_count, tensor_entry, places, not_finite, value_bits, record)


def mutants(files: list[bytes], count: int, seed: int) -> Any:
    """Make (kind, whether the digest is right, the mutant, its base file)."""
    rng = random.Random(seed)
    for i in range(count):
        base = rng.choice(files)
        if i % 2 == 0:
            damage = rng.choice(DAMAGE)
            yield damage.__name__, False, bytes(damage(rng, bytearray(base))), base
        elif rng.random() < 0.1:
            yield "text", True, bytes(text(rng, Parts(base))), base
        else:
            parts, attacks = Parts(base), rng.choices(ATTACKS, k=rng.choice((1, 1, 1, 2)))
            try:
                for attack in attacks:
                    attack(rng, parts)
                mutant = parts.file()
            except (
                AttributeError,
                IndexError,
                KeyError,
                TypeError,
                ValueError,
                struct.error,
            ):  # the second mutation had nothing left to change
                continue
            yield attacks[0].__name__, True, bytes(mutant), base


# -- watching ---------------------------------------------------------------------------------------------------------------


def outcome(path: Path, digest_is_right: bool, mutant: bytes, base: bytes) -> str:
    """Return "refused" or "loaded". Raises AssertionError at anything else."""
    path.write_bytes(mutant)
    try:
        net = zoo.load(path)
    except zoo.FormatError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith(str(path)) and len(refusal) < 1500, f"no clear message: {refusal[:2000]}"
        return "refused"
    assert digest_is_right or mutant == base, "a damaged file was loaded"
    info = zoo.info(path)
    for name, (size, where, values) in connections(net).items():
        row = next(row for row in info["connectivity"]["rows"] if row["name"] == name)
        assert tuple(size) == row["shape"] and len(where) == row["active"] == len(values), f"{name}: not what the file says"
        assert bool((where[1:] > where[:-1]).all()) and int(where.min()) >= 0 and int(where.max()) < size.numel()
        assert bool(torch.isfinite(values).all())
    return "loaded"


def main(count: int = 20_000, seed: int = 0) -> None:
    events: Counter[str] = Counter()
    watching = False

    def hook(event: str, arguments: Any) -> None:
        if watching and event in EVENTS:
            events[f"{event} {str(arguments)[:100]}"] += 1

    sys.addaudithook(hook)
    with tempfile.TemporaryDirectory() as folder:
        files = base_files(Path(folder))
        path = Path(folder) / "mutant.safetensors"
        for file in files:  # do imports and compilation of the first use now
            assert outcome(path, True, file, file) == "loaded"
            for _, right, mutant, base in mutants([file], 200, seed=-1):
                outcome(path, right, mutant, base)
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found: Counter[str] = Counter()
        excess: dict[
            str, int
        ] = {}  # kind -> bytes above twice the file and the model, which is about as large as the valid file
        for i, (kind, right, mutant, base) in enumerate(mutants(files, count, seed)):
            measured = i % 16 == 1
            if measured:
                tracemalloc.start()
            watching = True
            try:
                result = outcome(path, right, mutant, base)
            except BaseException:
                watching = False
                Path("mutant.safetensors").write_bytes(mutant)
                print(f"mutant {i} ({kind}, seed {seed}) is kept as mutant.safetensors", file=sys.stderr)
                raise
            watching = False
            found[f"{kind:18s} {result}"] += 1
            if measured:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                excess[kind] = max(excess.get(kind, 0), peak - 2 * len(mutant) - 8 * len(base))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for line in sorted(found):
        print(f"{line} {found[line]:6d}")
    print(f"{sum(found.values())} mutants; the resident set grew by {grown:.1f} MiB")
    print(f"Python's and NumPy's peak above 2 x file + model, KiB: { {kind: value // 1024 for kind, value in excess.items()} }")
    print(f"imported, compiled, executed, unpickled: {dict(events) or 'nothing'}")
    assert not events, "a file executed something"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
