"""Rewiring under the ``Trainer`` of transformers, through its callbacks.

transformers is imported when the callback is made, and not before.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_deepr.weights.find import converted_tensors

if TYPE_CHECKING:
    from lightning_deepr.training.callback import Rewiring, SparseTraining

STATE = "lightning_deepr.pt"  # in the folder of each checkpoint, beside those of transformers


def transformers_callback(method: SparseTraining, checkpoint: str | Path | None = None) -> Any:
    """Make a ``transformers.TrainerCallback`` that rewires with a method of this package.

    The model is converted when the Trainer is made, unless it is converted already (:func:`lightning_deepr.sparsify`). Each
    checkpoint gets a file of the method's state. A training that is resumed from a checkpoint
    (``trainer.train(resume_from_checkpoint=...)``) goes on exactly.

    Args:
        method: the method, for example ``DeepR(connectivity=0.1)``; ``connectivity=None`` if the model is converted already.
        checkpoint: the folder to resume from, if it is not ``checkpoint-<step>`` in ``args.output_dir``.

    Returns:
        a ``TrainerCallback``.

    Raises:
        ImportError: transformers is not installed.
        ValueError: at the beginning of a training, if the optimizer was made before the model was converted.
        FileNotFoundError: when a training is resumed from a checkpoint without the method's state.

    Example (``tests/training/test_transformers.py`` runs it)::

        model = BertForSequenceClassification(config)
        trainer = Trainer(model, TrainingArguments("out"), train_dataset=data,
                          callbacks=[transformers_callback(DeepR(0.1))])
        trainer.train()
        trainer.train(resume_from_checkpoint="out/checkpoint-500")
    """
    return _kind()(method, checkpoint)


@cache
def _kind() -> Any:
    from transformers import TrainerCallback

    class RewiringCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def __init__(self, method: SparseTraining, checkpoint: str | Path | None) -> None:
            self.method, self.checkpoint = method, None if checkpoint is None else Path(checkpoint)
            self.rewiring: Rewiring | None = None

        def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if self.method.connectivity is not None and not any(True for _ in converted_tensors(model)):
                self.method.prepare(model)

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
        ) -> None:
            self._stop()
            self.rewiring = self.method.attach(model, optimizer, total_steps=state.max_steps)
            if state.global_step > 0:
                folder = self.checkpoint or _folder(args, state)
                if not (folder / STATE).is_file():
                    self._stop()
                    raise FileNotFoundError(
                        f"{type(self.method).__name__}: the training goes on after step {state.global_step}, and {folder} "
                        f"has no {STATE}: expected a checkpoint of a training with this callback, written to its end. Give "
                        "transformers_callback(..., checkpoint=FOLDER) for a checkpoint elsewhere, or resume from an older one."
                    )
                self.rewiring.load_state_dict(torch.load(folder / STATE, weights_only=True))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.rewiring is not None and state.is_world_process_zero:
                whole, part = _folder(args, state) / STATE, _folder(args, state) / (STATE + ".part")
                torch.save(self.rewiring.state_dict(), part)
                part.replace(whole)  # a process that is killed leaves no half of a file

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._stop()

        def _stop(self) -> None:
            if self.rewiring is not None:
                self.rewiring.remove()
                self.rewiring = None

    return RewiringCallback


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
