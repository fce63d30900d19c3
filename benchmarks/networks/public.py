"""Some twenty public architectures at their published widths, with random weights, on small images or short texts.

Depths and vocabularies are cut where a step would take seconds on one thread.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from networks.case import Case, Feed, images

TOKENS = 128
VOCABULARY = 1000
# name: (pixels of an image, images)
TORCHVISION = {
    "resnet18": (64, 8),
    "resnet50": (64, 4),
    "mobilenet_v2": (64, 8),
    "mobilenet_v3_small": (64, 16),
    "efficientnet_b0": (64, 4),
    "densenet121": (64, 4),
    "squeezenet1_1": (64, 16),
    "shufflenet_v2_x1_0": (64, 16),
    "regnet_y_400mf": (64, 8),
    "convnext_tiny": (64, 4),
    "swin_t": (64, 4),
}
# name: (pixels of an image, images, arguments)
TIMM: dict[str, tuple[int, int, dict[str, Any]]] = {
    "deit_tiny_patch16_224": (224, 2, {}),
    "mixer_s16_224": (224, 2, {}),
    "resmlp_12_224": (224, 2, {}),
    "poolformer_s12": (64, 8, {}),
    "edgenext_xx_small": (64, 8, {}),
}
# class of the model: (texts, options of its configuration, layers to convert)
TEXTS: dict[str, tuple[int, dict[str, Any], str | list[str]]] = {
    "BertForSequenceClassification": (
        8,
        {"hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 512},
        "all",
    ),
    "DistilBertForSequenceClassification": (2, {"n_layers": 3}, "all"),
    "GPT2LMHeadModel": (4, {"n_embd": 384, "n_layer": 6, "n_head": 6}, ["c_attn", "c_proj", "c_fc"]),
    "LlamaForCausalLM": (
        4,
        {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 688},
        "all",
    ),
    "T5EncoderModel": (4, {"num_layers": 6}, "all"),
}


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(weights=None, num_classes=100)  # type: ignore[no-any-return]

    return build


def _timm(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=100, **options)  # type: ignore[no-any-return]

    return build


def _text(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class(vocab_size=VOCABULARY, pad_token_id=0, **options))  # type: ignore[no-any-return]

    return build


def _tokens(texts: int) -> Callable[[bool], Feed]:
    return lambda training: Feed(kwargs={"input_ids": torch.randint(1, VOCABULARY, (texts, TOKENS))})


def cases() -> Iterator[Case]:
    """List the architectures of the packages that are installed; the others are said. The packages take turns."""
    found = {
        "torchvision": [
            Case(f"torchvision/{name}", _torchvision(name), images(size, many)) for name, (size, many) in TORCHVISION.items()
        ],
        "timm": [
            Case(f"timm/{name}", _timm(name, options), images(size, many)) for name, (size, many, options) in TIMM.items()
        ],
        "transformers": [
            Case(f"transformers/{name}", _text(name, options), _tokens(many), targets)
            for name, (many, options, targets) in TEXTS.items()
        ],
    }
    for package in list(found):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its architectures are skipped", flush=True)
            del found[package]
    while any(found.values()):
        for one in found.values():
            yield from one[:1]
            del one[:1]
