"""The networks of the paper's benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


class LeNet300100(nn.Module):
    """LeNet-300-100: fully connected 784-300-100-10 with ReLU, as in Han et al. (2015) and the paper's MNIST experiment.

    266,200 weights. The authors' scripts have no biases; here they are optional and stay dense.

    Args:
        bias: whether the layers have biases.

    Shapes:
        input [batch, 1, 28, 28] or [batch, 784], output [batch, 10] (logits).

    Example::

        >>> import torch
        >>> LeNet300100()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300, bias=bias)
        self.fc2 = nn.Linear(300, 100, bias=bias)
        self.fc3 = nn.Linear(100, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.flatten(1)).relu()
        return self.fc3(self.fc2(x).relu())


class ResponseNorm(nn.Module):
    """Local response normalization over channels: x / (k + alpha / size * sum of x^2 over ``size`` channels) ** .75.

    It computes the same as :class:`torch.nn.LocalResponseNorm` with beta .75, as a 1 x 1 convolution with a band of ones. On
    the CPU torch's own module takes as long as both convolutions of :class:`CIFAR10CNN`.

    Args:
        channels: C, the number of channels.
        size: number of channels in the window, odd.
        alpha: torch's ``alpha``, which is TensorFlow's times ``size``.
        k: torch's ``k``, which is TensorFlow's ``bias``.

    Shapes:
        input and output [batch, C, H, W].

    Example::

        >>> x = torch.randn(2, 64, 5, 5)
        >>> torch.allclose(ResponseNorm(64)(x), nn.LocalResponseNorm(9, 1e-3, 0.75, 1.0)(x), atol=1e-6)
        True
    """

    band: Tensor

    def __init__(self, channels: int, size: int = 9, alpha: float = 1e-3, k: float = 1.0) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"size: expected an odd number of channels, found {size}.")
        self.k = k
        i = torch.arange(channels)
        band = ((i[:, None] - i).abs() <= size // 2).to(torch.get_default_dtype()) * (alpha / size)
        self.register_buffer("band", band[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Response.apply(x, self.band, self.k)[0]  # type: ignore[no-any-return,no-untyped-call]
        return _Response.forward(x, self.band, self.k)[0]


class _Response(torch.autograd.Function):
    """The same function with a gradient of its own, which takes a third of autograd's time.

    With t = k + band * x^2: y = x t^-.75 and dy_i/dx_j = [i = j] t_i^-.75 - 1.5 x_i t_i^-1.75 band_ij x_j.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, band: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
        root = (conv2d(x * x, band) + k).rsqrt()
        scale = root * root.sqrt()  # t ** -.75 without a power
        return x * scale, root, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, band, ctx.k = inputs
        y, root, scale = output
        ctx.mark_non_differentiable(root, scale)
        ctx.set_materialize_grads(False)  # makes no zeros as gradients of these two
        ctx.save_for_backward(x, y, root, scale, band)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        x, y, root, scale, band = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the gradient must be differentiable itself
            total = conv2d(x * x, band) + ctx.k
            inner = gradient * x * total**-1.75
            return gradient * total**-0.75 - 1.5 * x * conv2d(inner, band), None, None
        inner = (gradient * y).mul_(root).mul_(root)
        found = conv2d(inner, (-1.5 * band).to(inner.dtype)).mul_(x)  # the band is symmetric
        return found.addcmul_(gradient, scale), None, None


class CIFAR10CNN(nn.Module):
    """The CNN of TensorFlow's "deep_cnn" tutorial, which the paper's CIFAR-10 experiment uses; 1,067,584 weights.

    It has two convolutions of 5 x 5 with 64 channels, each with max-pooling 3/2 and local response normalization, and three
    linear layers 2304-384-192-10. As in the tutorial, pooling comes before the first normalization and after the second. The
    start is the tutorial's: truncated normal weights with standard deviation .05, .05, .04, .04 and 1/192, biases 0, .1, .1, .1
    and 0.

    Shapes:
        input [batch, 3, 24, 24] (standardized per image), output [batch, 10] (logits).

    Example::

        >>> CIFAR10CNN()(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for name, p in CIFAR10CNN().named_parameters() if name.endswith("weight"))
        1067584
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 5, padding=2)
        self.norm1 = ResponseNorm(64)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.norm2 = ResponseNorm(64)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)  # equals TensorFlow's "SAME" for 24 and 12 pixels
        self.local3 = nn.Linear(2304, 384)
        self.local4 = nn.Linear(384, 192)
        self.output = nn.Linear(192, 10)
        start = (
            (self.conv1, 0.05, 0.0),
            (self.conv2, 0.05, 0.1),
            (self.local3, 0.04, 0.1),
            (self.local4, 0.04, 0.1),
            (self.output, 1 / 192, 0.0),
        )
        for layer, deviation, bias in start:
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        # The tutorial applies the ReLU before the pooling: the result is the same, computed on four times as many values.
        x = self.norm1(self.pool(self.conv1(x)).relu())
        x = self.pool(self.norm2(self.conv2(x).relu()))
        x = self.local3(x.flatten(1)).relu()
        return self.output(self.local4(x).relu())


class BLSTMClassifier(nn.Module):
    """A bidirectional LSTM with a linear layer over each frame, as in the paper's TIMIT experiment.

    The sizes are this project's. The defaults give 186,368 weights: 39,936 input weights, 131,072 recurrent weights and 15,360
    in the last layer.

    Args:
        inputs: features per frame.
        hidden: units per direction.
        classes: number of classes.
        layers: number of LSTM layers.
        dropout: dropout probability of the outputs of each LSTM layer.

    Shapes:
        input [batch, time, inputs] and lengths int64 [batch] (None: all are ``time`` long), output [batch, time, classes]
        (logits). Sequences are padded at the end. The padding has no effect on the frames before it; the logits in the padding
        mean nothing.

    Example::

        >>> BLSTMClassifier()(torch.zeros(2, 50, 39), torch.tensor([50, 30])).shape
        torch.Size([2, 50, 60])
    """

    def __init__(self, inputs: int = 39, hidden: int = 128, classes: int = 60, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            inputs, hidden, layers, batch_first=True, bidirectional=True, dropout=dropout if layers > 1 else 0.0
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        time = x.shape[1]
        if lengths is not None and lengths.shape != x.shape[:1]:
            raise ValueError(f"lengths: expected one per sequence, shape {tuple(x.shape[:1])}, found {tuple(lengths.shape)}.")
        lengths = None if lengths is None else lengths.cpu()
        if lengths is None or bool((lengths == time).all()):  # no padding: no need to pack
            y, _ = self.lstm(x)
        else:
            if int(lengths.min()) < 1 or int(lengths.max()) > time:
                raise ValueError(f"lengths: expected 1 to {time} frames, found {int(lengths.min())} to {int(lengths.max())}.")
            y = self._two_passes(x, lengths) if self._avoid_packing(x) else self._packed(x, lengths)
        return self.head(self.dropout(y))

    def _avoid_packing(self, x: Tensor) -> bool:
        """Whether two passes are faster than packing.

        On the CPU the time of a packed sequence's backward pass grows with the square of its length. At 500 frames it takes 15
        times as long as two passes.
        """
        return self.lstm.num_layers == 1 and x.device.type == "cpu" and torch.is_grad_enabled()

    def _packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    def _two_passes(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Compute each direction in a pass of its own.

        The padding lies at the end for the forward direction and is moved to the beginning for the backward one, so that
        neither direction reads it before a frame.
        """
        total, hidden = x.shape[1], self.lstm.hidden_size
        time, shift = torch.arange(total), (total - lengths)[:, None]
        moved = x.gather(1, ((time - shift) % total)[:, :, None].expand_as(x))
        forward, backward = self.lstm(x)[0][..., :hidden], self.lstm(moved)[0][..., hidden:]
        backward = backward.gather(1, ((time + shift) % total)[:, :, None].expand_as(backward))
        return torch.cat([forward, backward], -1)
