"""Architectures of torchvision, narrow and shallow where the constructor allows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import detection, optical_flow, segmentation, video

from networks.case import Case, Feed, images

WIDTHS = ((16, 24), (24, 32))


def _resnet(block: Any, **options: Any) -> nn.Module:
    return models.ResNet(block, [1, 1, 1, 1], num_classes=10, **options)


def _bottleneck() -> Any:
    from torchvision.models.resnet import Bottleneck

    return Bottleneck


def _basic() -> Any:
    from torchvision.models.resnet import BasicBlock

    return BasicBlock


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig

    return models.ConvNeXt([CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 1)], num_classes=10)


def _swin(version: int) -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    newer = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    return models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=10, **newer)


def _vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=10)


def _vgg() -> nn.Module:
    from torchvision.models.vgg import make_layers

    # (VGG's own constructor makes 120 million weights before they can be replaced)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(make_layers([16, "M", 32, "M", 64, "M"], batch_norm=True), *head)


def _densenet() -> nn.Module:
    return models.DenseNet(growth_rate=8, block_config=(2, 2, 2), num_init_features=16, num_classes=10)


def _efficientnet(kind: str) -> nn.Module:
    from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

    make = FusedMBConvConfig if kind == "fused" else MBConvConfig
    setting = [make(expand_ratio=2, kernel=3, stride=2, input_channels=a, out_channels=b, num_layers=1) for a, b in WIDTHS]
    return models.EfficientNet(setting, dropout=0.1, num_classes=10, last_channel=64)


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams

    return models.RegNet(BlockParams.from_init_params(depth=4, w_0=16, w_a=20.0, w_m=2.0, group_width=8), num_classes=10)


def _maxvit() -> nn.Module:
    return models.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.1, num_classes=10)


def _fasterrcnn() -> nn.Module:
    return detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=96, box_detections_per_img=10
    )


def _retinanet() -> nn.Module:
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    backbone = _resnet_fpn_extractor(_resnet(_basic()), 5)
    return detection.RetinaNet(backbone, num_classes=5, min_size=96, max_size=96, anchor_generator=_anchors(5))


def _anchors(levels: int) -> Any:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(((16, 32),) * levels, ((0.5, 1.0, 2.0),) * levels)


def _detected(training: bool) -> Feed:
    pictures = [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    return Feed((pictures, [target, target])) if training else Feed((pictures,))


def _segmenter(make: Any) -> nn.Module:
    return make(weights=None, weights_backbone=None, num_classes=4)


def _fcn() -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCNHead

    backbone = IntermediateLayerGetter(_resnet(_basic()), {"layer4": "out", "layer3": "aux"})
    return segmentation.FCN(backbone, FCNHead(512, 4), FCNHead(256, 4))


def _video(stem: Any, convs: Any) -> nn.Module:
    return video.resnet.VideoResNet(video.resnet.BasicBlock, convs, [1, 1, 1, 1], stem, num_classes=10)


def _swin3d() -> nn.Module:
    return video.SwinTransformer3d([2, 4, 4], 24, [1, 1], [2, 4], [2, 4, 4], num_classes=10)


def _mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig

    blocks = [
        MSBlockConfig(1, a, b, [3, 3, 3], [3, 3, 3], q, [1, 2, 2]) for a, b, q in [(16, 32, [1, 1, 1]), (32, 32, [1, 2, 2])]
    ]
    return video.MViT((32, 32), 4, blocks, True, True, True, True, num_classes=10)


def _flow(training: bool) -> Feed:
    return Feed((torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)), {"num_flow_updates": 2})


def cases() -> Iterator[Case]:
    """List the architectures."""
    small = images(32)
    yield Case("torchvision/resnet_basic", lambda: _resnet(_basic()), small)
    yield Case("torchvision/resnet_bottleneck", lambda: _resnet(_bottleneck()), small)
    yield Case("torchvision/resnext", lambda: _resnet(_bottleneck(), groups=8, width_per_group=4), small)
    yield Case("torchvision/vgg_bn", _vgg, small)
    yield Case("torchvision/densenet", _densenet, small)
    yield Case("torchvision/squeezenet1_1", lambda: models.squeezenet1_1(num_classes=10), images(64))
    yield Case("torchvision/shufflenet_v2_x0_5", lambda: models.shufflenet_v2_x0_5(num_classes=10), images(64))
    yield Case("torchvision/mobilenet_v2_x0_25", lambda: models.mobilenet_v2(num_classes=10, width_mult=0.25), images(64))
    yield Case(
        "torchvision/mobilenet_v3_small_x0_25", lambda: models.mobilenet_v3_small(num_classes=10, width_mult=0.25), images(64)
    )
    yield Case("torchvision/mnasnet_x0_25", lambda: models.MNASNet(0.25, num_classes=10), images(64))
    yield Case("torchvision/efficientnet", lambda: _efficientnet("mb"), small)
    yield Case("torchvision/efficientnet_v2", lambda: _efficientnet("fused"), small)
    yield Case("torchvision/regnet", _regnet, small)
    yield Case(
        "torchvision/googlenet", lambda: models.googlenet(num_classes=10, aux_logits=False, init_weights=False), images(64)
    )
    yield Case("torchvision/convnext", _convnext, small)
    yield Case("torchvision/vit", _vit, small)
    yield Case("torchvision/swin", lambda: _swin(1), small)
    yield Case("torchvision/swin_v2", lambda: _swin(2), small)
    yield Case("torchvision/maxvit", _maxvit, small)
    yield Case("torchvision/lraspp_mobilenet_v3", lambda: _segmenter(segmentation.lraspp_mobilenet_v3_large), images(64))
    yield Case("torchvision/fcn", _fcn, images(64))
    yield Case("torchvision/fasterrcnn_mobilenet_v3", _fasterrcnn, _detected)
    yield Case("torchvision/retinanet", _retinanet, _detected)
    yield Case("torchvision/r3d", lambda: _video(video.resnet.BasicStem, [video.resnet.Conv3DSimple] * 4), images(32, frames=4))
    yield Case(
        "torchvision/r2plus1d", lambda: _video(video.resnet.R2Plus1dStem, [video.resnet.Conv2Plus1D] * 4), images(32, frames=4)
    )
    yield Case("torchvision/swin3d", _swin3d, images(32, frames=4))
    yield Case("torchvision/mvit", _mvit, images(32, frames=4))
    yield Case("torchvision/raft_small", lambda: optical_flow.raft_small(), _flow)
