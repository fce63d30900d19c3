"""The Trainer of transformers: converted when it is made, rewired, and resumed exactly from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_deepr import DeepR, sparsify
from lightning_deepr.training.transformers_trainer import STATE, transformers_callback
from tests.helpers.state import all_slots, assert_connected, assert_equal_states, state_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.slow  # importing transformers takes long

STEPS, BATCH = 12, 4
CONFIG = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def dataset() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(40, (STEPS * BATCH, 7), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]


def trainer_of(folder: Path, converted: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ).to(dtype)
    if converted:
        sparsify(model, 0.3, seed=4)
    callback = transformers_callback(DeepR(None if converted else 0.3, l1=0.5, temperature=1e-6, seed=4, check_invariants=True))
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, save_steps=5, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=dataset(), callbacks=[callback])


@pytest.mark.feature("Others: transformers' Trainer, resumed from its checkpoint")
@pytest.mark.parametrize(
    ("converted", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)], ids=str
)
def test_a_resumed_training_is_the_uninterrupted_one(converted: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = trainer_of(tmp_path, converted, dtype)
    assert all_slots(whole.model), "the model was not converted when the Trainer was made"
    start = [slots.places.clone() for slots in all_slots(whole.model)]
    whole.train()
    assert_connected(whole.model)
    born = max(int(slots.born.max()) for slots in all_slots(whole.model))
    assert born > 5, "nothing was reborn after the checkpoint"
    assert any(not torch.equal(a, slots.places) for a, slots in zip(start, all_slots(whole.model), strict=True))
    assert (tmp_path / "checkpoint-5" / STATE).is_file()

    again = trainer_of(tmp_path, converted, dtype)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal_states(state_of(again.model, again.optimizer), state_of(whole.model, whole.optimizer))


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    trainer_of(tmp_path).train()
    (tmp_path / "checkpoint-5" / STATE).unlink()
    with pytest.raises(FileNotFoundError, match=r"goes on after step 5, and .* has no lightning_deepr\.pt"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.feature("Precision: a model that was loaded in bfloat16, then converted")
def test_a_model_that_was_loaded_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**CONFIG)).save_pretrained(tmp_path)
    model = sparsify(transformers.BertModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), 0.3)
    for slots in all_slots(model):
        assert slots.weight_dtype == torch.bfloat16 and slots.signs.dtype == torch.float32
    hidden = model(torch.arange(7)[None]).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    again = transformers.BertModel.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert torch.equal(again(torch.arange(7)[None]).last_hidden_state, hidden)
