"""An adaptation under the Trainer, and of networks of transformers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import SET, DeepR, adapt, load_adapter, save_adapter
from lightning_deepr.weights.find import converted_tensors


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 4))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Crash(Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 9:
            raise RuntimeError("crash")


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 20, generator=generator), torch.randint(0, 4, (40,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=10)


def fit(module: Classifier, folder: Path, *callbacks: Callback, resume: Path | None = None, method: Any = DeepR) -> None:
    often: dict[str, Any] = {"rewire_every_n_steps": 2} if method is SET else {}
    callback = method(connectivity=0.1, of="difference", trainable=["norms"], check_invariants=True, seed=2, **often)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, checkpoints, *callbacks],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(), ckpt_path=resume, weights_only=True if resume else None)


@pytest.mark.parametrize("method", [DeepR, SET])
def test_one_line_under_the_trainer_and_a_crash(method: Any, tmp_path: Path) -> None:
    whole = Classifier()
    pretrained = copy.deepcopy(whole)
    fit(whole, tmp_path / "whole", method=method)
    own = dict(pretrained.named_parameters())
    adapted = list(converted_tensors(whole))
    assert [one.name for one in adapted] == ["net.0.weight", "net.3.weight"]
    assert all(torch.equal(one.slots.base, own[one.name]) for one in adapted)  # type: ignore[attr-defined]
    assert all(bool(one.theta.any()) for one in adapted)
    assert torch.equal(whole.net[0].bias, own["net.0.bias"]) and not torch.equal(whole.net[1].weight, own["net.1.weight"])  # type: ignore[arg-type]
    again = load_adapter(copy.deepcopy(pretrained), save_adapter(whole, tmp_path / "adapter.safetensors"))
    x = torch.randn(3, 20)
    torch.testing.assert_close(again.net(x), whole.net(x))

    with pytest.raises(RuntimeError, match="crash"):
        fit(Classifier(), tmp_path / "crashed", Crash(), method=method)
    resumed = Classifier()
    fit(resumed, tmp_path / "crashed", resume=tmp_path / "crashed" / "step=8.ckpt", method=method)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_an_average_keeps_the_frozen_weights(tmp_path: Path) -> None:
    """decay * a + (1 - decay) * b is not always a where b is a: the last bits would drift, and the digest with them."""
    module = Classifier()
    pretrained = copy.deepcopy(module)
    fit(module, tmp_path, EMAWeightAveraging(decay=0.9))
    own = dict(pretrained.named_parameters())
    adapted = list(converted_tensors(module))
    assert all(torch.equal(one.slots.base, own[one.name]) for one in adapted)  # type: ignore[attr-defined]
    assert all(bool(one.theta.any()) for one in adapted)
    again = load_adapter(pretrained, save_adapter(module, tmp_path / "adapter.safetensors"))
    x = torch.randn(3, 20)
    torch.testing.assert_close(again.net(x), module.net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_networks_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":  # Conv1D layers; the embedding and the head are one tensor
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=30, n_positions=16)
        net, targets = transformers.GPT2LMHeadModel(config).eval(), ["c_attn", "c_fc", "lm_head"]
    else:
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30
        )  # fmt: skip
        net, targets = transformers.BertModel(config).eval(), "all-linear"
    x = torch.randint(0, 30, (2, 8))
    pretrained = copy.deepcopy(net)

    def run(one: nn.Module) -> Tensor:
        found: Tensor = one(x)[0]
        return found

    before = run(net).detach()
    adapt(net, 0.1, target_modules=targets)
    assert torch.equal(run(net), before)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    rewiring = DeepR(check_invariants=True).attach(net, optimizer, total_steps=5)
    target, losses = torch.randn_like(before), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (run(net) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    rewiring.remove()
    assert losses[-1] < losses[0]
    again = load_adapter(copy.deepcopy(pretrained), save_adapter(net, tmp_path / "a.safetensors"))
    torch.testing.assert_close(run(again), run(net))
    if kind == "gpt2":
        assert net.lm_head.parametrizations.weight.original is net.transformer.wte.parametrizations.weight.original
    net.save_pretrained(tmp_path / "merged")  # the sum, which loads without this package
    torch.testing.assert_close(run(type(pretrained).from_pretrained(tmp_path / "merged").eval()), run(net))
