"""Architectures of timm. Its ``test_*`` networks are tiny; the others have fewer and narrower blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
from timm.layers import GatedMlp
from timm.models import convmixer, focalnet, metaformer, mlp_mixer, volo
from torch import nn

from networks.case import Case, images

# name: (size of the images, arguments beside the number of classes)
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "test_byobnet": (64, {}),
    "test_convnext": (64, {}),
    "test_convnext2": (64, {}),
    "test_convnext3": (64, {}),
    "test_efficientnet": (64, {}),
    "test_efficientnet_evos": (64, {}),
    "test_efficientnet_gn": (64, {}),
    "test_efficientnet_ln": (64, {}),
    "test_mambaout": (64, {}),
    "test_nfnet": (64, {}),
    "test_resnet": (64, {}),
    "test_coatnet": (64, {"img_size": 64}),
    "test_maxvit": (64, {"img_size": 64}),
    "test_vit": (64, {"img_size": 64}),
    "test_vit2": (64, {"img_size": 64}),
    "test_vit3": (64, {"img_size": 64}),
    "test_vit4": (64, {"img_size": 64}),
    "test_vit_relpos": (64, {"img_size": 64}),
    "lcnet_035": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_035": (64, {}),
    "ghostnet_050": (64, {}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "starnet_s050": (64, {}),
    "fasternet_t0": (64, {"depths": (1, 1, 1, 1)}),
    "inception_next_atto": (64, {"depths": (1, 1, 1, 1)}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "repvit_m0_9": (64, {"depth": (1, 1, 1, 1), "embed_dim": (16, 24, 32, 48)}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "depth": 2}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 48}),
    "beit_base_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2, "embed_dim": 48}),
    "swin_tiny_patch4_window7_224": (
        28,
        {"img_size": 28, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
    ),
    "swinv2_tiny_window8_256": (32, {"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}),
    "pit_ti_224": (32, {"img_size": 32, "depth": (1, 1, 1)}),
    "coat_tiny": (32, {"img_size": 32, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1, "embed_dims": (32, 32, 32, 32)}),
    "convit_tiny": (32, {"img_size": 32, "depth": 2, "local_up_to_layer": 1}),
    "levit_128s": (64, {"img_size": 64, "depth": (1, 1, 1)}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {"img_size": 64, "embed_dims": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}),
    "visformer_tiny": (64, {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 48}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}),
    "edgenext_xx_small": (64, {"depths": (1, 1, 2, 1)}),
    "hiera_tiny_224": (64, {"img_size": (64, 64), "embed_dim": 24, "stages": (1, 1, 1, 1)}),
    "sequencer2d_s": (
        32,
        {"img_size": 32, "embed_dims": (24, 24, 24, 24), "layers": (1, 1, 1, 1), "hidden_sizes": (8, 8, 8, 8)},
    ),
    "crossvit_9_240": (48, {}),
    "tnt_s_legacy_patch16_224": (32, {"img_size": 32, "depth": 2, "embed_dim": 48}),
    "resnetv2_50": (32, {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64)}),
    "res2net50_26w_4s": (32, {"layers": (1, 1, 1, 1)}),
    "skresnet18": (32, {"layers": (1, 1, 1, 1)}),
    "densenet121": (32, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "rexnetr_100": (64, {"width_mult": 0.5}),
    "regnetx_002": (64, {}),
    "gcresnext26ts": (64, {}),
    "lambda_resnet26t": (64, {}),
}


# architectures whose registered functions fix what has to be smaller
CLASSES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "MlpMixer": (32, lambda: _mixer(mlp_mixer.MixerBlock)),
    "ResMLP": (32, lambda: _mixer(mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, mlp_ratio=4)),
    "gMLP": (32, lambda: _mixer(mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=6)),
    "ConvMixer": (32, lambda: convmixer.ConvMixer(48, 2, kernel_size=5, patch_size=4, num_classes=10)),
    "PoolFormer": (
        64,
        lambda: metaformer.MetaFormer(
            num_classes=10, depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), token_mixers=metaformer.Pooling
        ),
    ),
    "FocalNet": (64, lambda: focalnet.FocalNet(num_classes=10, embed_dim=16, depths=(1, 1, 1, 1))),
    "VOLO": (
        32,
        lambda: volo.VOLO(
            (1, 1, 1, 1),
            img_size=32,
            num_classes=10,
            embed_dims=(24, 48, 48, 48),
            num_heads=(2, 4, 4, 4),
            downsamples=(True, False, False, False),
            outlook_attention=(True, False, False, False),
        ),
    ),
}


def _mixer(block: Any, **options: Any) -> nn.Module:
    return mlp_mixer.MlpMixer(
        num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=48, block_layer=block, **options
    )


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=10, **options)


def cases() -> Iterator[Case]:
    """List the architectures."""
    for name, (size, options) in MODELS.items():
        yield Case(f"timm/{name}", partial(_build, name, options), images(size))
    for name, (size, build) in CLASSES.items():
        yield Case(f"timm/{name}", build, images(size))
