"""A small character transformer on Tiny Shakespeare, its attention and feed-forward weights at 10 %.

The embeddings and the last layer stay dense; `target_modules` chooses the rest. Without the text
(data/tinyshakespeare/input.txt, or --text FILE) a made-up one is used: sentences of a small grammar.

    python examples/char_transformer.py            # some ten minutes on a CPU
    python examples/char_transformer.py --short    # some seconds
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_deepr import DeepR, connectivity_report, decay_groups
from lightning_deepr.models import CharTransformer


def made_up_text(sentences: int = 20_000) -> str:
    """Write sentences of a small grammar."""
    choose = random.Random(0).choice
    who, does = ["the king", "a fool", "my lord", "the ghost", "her son"], ["sees", "fears", "loves", "betrays", "forgets"]
    return "".join(f"{choose(who)} {choose(does)} {choose(who)}, and {choose(who)} sleeps.\n" for _ in range(sentences))


class Windows(Dataset[Tensor]):
    """Every window of a text: `context` characters, and each one's next."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return len(self.text) - self.context

    def __getitem__(self, index: int) -> Tensor:
        return self.text[index : index + self.context + 1]


class Language(lightning.LightningModule):
    def __init__(self, net: CharTransformer, steps: int, lr: float) -> None:
        super().__init__()
        self.net, self.steps, self.lr = net, steps, lr

    def loss(self, text: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> dict[str, object]:
        # decay_groups: no weight decay for biases, norms and sparse weights, which have an L1 of their own
        optimizer = torch.optim.AdamW(decay_groups(self.net, 0.1), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def write(net: CharTransformer, start: Tensor, count: int) -> Tensor:
    """Go on with a text."""
    text = start
    for _ in range(count):
        probabilities = net.eval()(text[None, -net.context :])[0, -1].softmax(0)
        text = torch.cat([text, torch.multinomial(probabilities, 1)])
    return text


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path("data/tinyshakespeare/input.txt"))
    parser.add_argument("--connectivity", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one layer of width 32, 60 steps")
    given = parser.parse_args(arguments)
    steps, width, layers = (60, 32, 1) if given.short else (given.steps, 128, 4)
    lightning.seed_everything(given.seed, verbose=False)
    text = given.text.read_text(encoding="utf-8") if given.text.is_file() else made_up_text()
    letters = sorted(set(text))
    coded = torch.tensor([letters.index(letter) for letter in text])
    net = CharTransformer(len(letters), width, layers)
    train, test = (Windows(part, net.context) for part in coded.tensor_split([len(coded) * 9 // 10]))
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[DeepR(given.connectivity, target_modules=["net.layers.*"])],
        gradient_clip_val=1.0,
        limit_val_batches=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not given.short,
        enable_model_summary=False,
    )
    module = Language(net, steps, lr=2e-3)
    val = DataLoader(test, batch_size=64, sampler=range(0, len(test), net.context))
    before = trainer.validate(module, val, verbose=False)[0]["val_loss"]
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True))
    after = trainer.validate(module, val, verbose=False)[0]["val_loss"]
    print(connectivity_report(net))
    print("".join(letters[i] for i in write(net, coded[:1], 200)))
    print(f"loss on new text: {before:.3f} before, {after:.3f} after the training (natural logarithm, per character)")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
