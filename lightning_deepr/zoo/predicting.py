"""From a raw image, recording or text to the name of its class, in one line."""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_deepr.zoo.inputs import SpeechInput, TextInput
from lightning_deepr.zoo.loading import load


class Prediction(NamedTuple):
    """A class that a network predicts.

    Attributes:
        label: the name of the class.
        number: its number.
        probability: the network's probability of it.
    """

    label: str
    number: int
    probability: float


@torch.no_grad()
def predict(model: nn.Module | str | PathLike[str], raw: Any, **options: Any) -> Any:
    """Predict the class of a raw image, of each 10 ms of a recording, or the character that follows a text.

    Args:
        model: a network of :func:`lightning_deepr.zoo.load`, or a name or file that ``load`` takes.
        raw: what ``model.preprocess`` takes: a PIL image, array or tensor, a recording, or a text.
        options: arguments of ``model.preprocess``: ``rate``, of a recording.

    Returns:
        a :class:`Prediction`; a list of them for a batch of images (one each) and for a recording (one for each frame).

    Raises:
        ValueError: nobody recorded how the model wants its input, or ``raw`` does not fit (the message says what does).
        TypeError, ImportError: as ``model.preprocess`` raises them.

    Example::

        >>> from lightning_deepr.recipes.digits import embedded_digits
        >>> _, _, images, labels = embedded_digits()
        >>> predict("lenet300_100.deepr_1pct_mnist", images[0]).label, int(labels[0])
        ('0', 0)
    """
    net = model if isinstance(model, nn.Module) else load(model)
    prepare = getattr(net, "preprocess", None)
    if prepare is None:
        raise ValueError(
            f"{type(net).__name__}: expected a network with net.preprocess, which zoo.load sets if the file records how the "
            "input is prepared: found none. Prepare the input as the network's author did, and call the network."
        )
    x = prepare(raw, **options)
    is_speech = isinstance(prepare, SpeechInput)
    alone = x.dim() == len(prepare.shape)
    device = next(net.parameters()).device
    was_training = net.training
    try:
        logits = net.eval()((x[None] if alone else x).to(device))
    finally:
        net.train(was_training)
    if isinstance(prepare, TextInput):
        logits = logits[:, -1]  # the character after the last one
    probabilities = logits.softmax(-1).cpu()
    if is_speech:
        from lightning_deepr.recipes.timit_phones import folding

        probabilities = (probabilities @ folding(probabilities.shape[-1]))[0]
    best = probabilities.max(-1)
    found = [
        Prediction(prepare.classes[number] if prepare.classes else str(number), number, probability)
        for number, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return found[0] if alone and not is_speech else found
