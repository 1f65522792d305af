"""How a convolution is executed, apart from what it is: merged or split groups, norms folded in.

A grouped convolution that a library runs badly can be had from other convolutions, exactly:

- *merged*: the weights of neighbouring groups in one block-diagonal weight, with zeros between
  them, and fewer groups. More arithmetic, often far less time.
- *split*: every input channel by itself (a depthwise convolution for each output of a group), then
  a 1x1 convolution with ones adds up the channels of each group. No more arithmetic.

``groups`` says which: the number of groups left for a merge, the number of input channels for a
split, the convolution's own for neither.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def merge_weight(weight: Tensor, groups: int, merged: int) -> Tensor:
    """The weight that does with ``merged`` groups what ``weight`` does with ``groups``.

    Args:
        weight: (K, C / groups, k, k).
        groups: of the convolution that it belongs to.
        merged: the number of groups to leave, a divisor of ``groups``.

    Returns:
        (K, C / merged, k, k), block-diagonal; differentiable.
    """
    K, inputs, *size = weight.shape
    factor = groups // merged
    blocks = weight.view(merged, factor, K // groups, inputs, *size)
    # (merged, K / groups, C / groups, k, k, factor, factor), the last two a diagonal
    blocks = torch.diag_embed(blocks.movedim(1, -1))
    return blocks.movedim((-2, -1), (1, 3)).reshape(K, factor * inputs, *size)


def split_weights(weight: Tensor, groups: int) -> tuple[list[Tensor], list[Tensor]]:
    """Depthwise weights, and the 1x1 weights that add up what they make.

    Args:
        weight: (K, C / groups, k, k).

    Returns:
        K / groups weights (C, 1, k, k), and as many (K, C, 1, 1) of zeros and ones: the j-th pair
        makes the j-th output channel of every group.
    """
    K, inputs, *size = weight.shape
    outputs = K // groups
    grouped = weight.view(groups, outputs, inputs, *size)
    depthwise = [w.reshape(groups * inputs, 1, *size) for w in grouped.unbind(1)]
    sums = weight.new_zeros(outputs, groups, outputs, groups, inputs)
    for j in range(outputs):
        sums[j, :, j].diagonal().fill_(1)
    return depthwise, [w.view(K, groups * inputs, 1, 1) for w in sums.unbind(0)]


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that does what ``conv`` and then ``norm`` in eval do."""
    weight, bias = conv.weight.detach(), conv.bias
    if norm is None:
        return weight, None if bias is None else bias.detach()
    scale, shift = affine(norm)
    weight = weight.to(scale.dtype) * scale[:, None, None, None]
    return weight, shift if bias is None else torch.addcmul(shift, bias.detach(), scale)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The scale and shift (C,) that a BatchNorm2d in eval comes to, at least in float32."""
    mean, var = norm.running_mean.detach(), norm.running_var.detach()
    wide = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -mean.to(wide) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


class Call(NamedTuple):
    """One call of the library's convolution."""

    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


class Derived(nn.Module):
    """Something made from other modules' parameters, and remade when one of them changes.

    The sources stay where they are, in the checkpoint's shapes: a Derived adds nothing to the
    state_dict. It isn't copied or pickled either, only remade.
    """

    def __init__(self, *sources: nn.Module | None) -> None:
        super().__init__()
        # In a tuple, or they would be registered a second time.
        self._sources = tuple(s for s in sources if s is not None)
        self._state: object = None

    def derive(self) -> object:
        raise NotImplementedError

    def state(self) -> object:
        """What ``derive`` made of the sources as they are now."""
        if torch.compiler.is_compiling():
            return self._state
        stamp = tuple(
            (id(t), t._version)
            for source in self._sources
            for t in (*source._parameters.values(), *source._buffers.values())
            if t is not None
        )
        if self._state is None or stamp != self._stamp:
            with torch.inference_mode(False), torch.no_grad():
                self._state, self._stamp = self.derive(), stamp
        return self._state

    def _apply(self, fn, recurse=True):
        self._state = None
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return super().__getstate__() | {"_state": None}


class FoldedNorm(Derived):
    """The scale and shift of a BatchNorm2d in eval, for the tail's epilogue."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm)

    def derive(self) -> tuple[Tensor, Tensor]:
        return affine(self._sources[0])

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.state()


class PlannedConv(Derived):
    """A Conv2d for inference, with the BatchNorm2d that follows it folded in, run as planned.

    Args:
        conv: with zeros for its padding.
        norm: what follows it, or None.
        groups: how to run it, see above; None runs it as it is.
        memory_format: to run in; what comes in another is converted.
        dtype: to compute in; None is the convolution's own.
        fused_calls: use the library's own convolution + residual + relu where it has one; on CPUs,
            in channels_last, the weights are then kept in the order that oneDNN likes best.

    Shape: (B, C, H, W) -> (B, K, H', W').
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None = None,
        *,
        groups: int | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        dtype: torch.dtype | None = None,
        fused_calls: bool = True,
    ) -> None:
        super().__init__(conv, norm)
        self.groups = groups or conv.groups
        self.memory_format = memory_format
        self.dtype = dtype
        self.fused_calls = fused_calls
        self._packed: tuple[object, list[Call]] | None = None

    def derive(self) -> list[Call]:
        conv, norm = (*self._sources, None)[:2]
        weight, bias = fold(conv, norm)
        geometry = (conv.stride, _padding(conv), conv.dilation)
        if self.groups <= conv.groups:
            merged = merge_weight(weight, conv.groups, self.groups)
            return [self._call(merged, bias, self.groups, *geometry)]
        calls = []
        for depthwise, ones in zip(*split_weights(weight, conv.groups), strict=True):
            calls.append(self._call(depthwise, None, self.groups, *geometry))
            calls.append(self._call(ones, bias, 1, (1, 1), (0, 0), (1, 1)))
            bias = None  # once is enough
        return calls

    def _call(self, weight: Tensor, bias: Tensor | None, *geometry) -> Call:
        dtype = self.dtype or self._sources[0].weight.dtype
        # A copy also where nothing is folded, merged or cast: the source may be written to.
        weight = weight.to(dtype, memory_format=self.memory_format, copy=True)
        return Call(weight, None if bias is None else bias.to(dtype, copy=True), *geometry)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(conv(x) + residual), each part where it is asked for."""
        calls, run = self.state(), run_plain
        x = x.contiguous(memory_format=self.memory_format)
        if self.fused_calls and not torch.compiler.is_compiling():
            run = fused_call(x.device.type, x.dtype)
            # With packed weights what comes out is always channels_last.
            if run is run_onednn and self.memory_format == torch.channels_last and x.numel():
                calls = self._pack(calls, x)
        if len(calls) == 1:
            return run(calls[0], x, residual, relu)
        for depthwise, ones in zip(calls[:-2:2], calls[1:-2:2], strict=True):
            residual = run(ones, run(depthwise, x, None, False), residual, False)
        return run(calls[-1], run(calls[-2], x, None, False), residual, relu)

    def _pack(self, calls: list[Call], x: Tensor) -> list[Call]:
        """The calls with weights in oneDNN's order for x; right for any other size, too."""
        if self._packed is None or self._packed[0] is not calls:
            with torch.inference_mode(False), torch.no_grad():
                self._packed = calls, [_packed(call, x) for call in calls]
        return self._packed[1]

    def __getstate__(self):
        return super().__getstate__() | {"_packed": None}


def _packed(call: Call, x: Tensor) -> Call:
    size = [x.shape[0], call.weight.shape[1] * call.groups, *x.shape[2:]]
    geometry = (call.padding, call.stride, call.dilation, call.groups)
    weight = torch.ops.mkldnn._reorder_convolution_weight(call.weight, *geometry, size)
    return call._replace(weight=weight)


@functools.cache
def fused_call(device_type: str, dtype: torch.dtype):
    """The function that runs a Call with its residual and relu by the library's own, if any."""
    if device_type == "cpu" and torch.backends.mkldnn.is_available():
        supported = {
            torch.float32: lambda: True,
            torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
        }
        return run_onednn if dtype in supported and supported[dtype]() else run_plain
    if device_type == "cuda" and torch.version.cuda:
        return run_cudnn if dtype in (torch.float32, torch.float16) else run_plain
    return run_plain


def run_plain(call: Call, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    weight, bias, groups, stride, padding, dilation = call
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out


def run_onednn(call: Call, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if x.numel() == 0:
        return run_plain(call, x, residual, relu)
    weight, bias, groups, stride, padding, dilation = call
    geometry = (padding, stride, dilation, groups)
    convolve = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return convolve(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
    after = "relu" if relu else None
    return convolve(x, residual, weight, bias, *geometry, "add", 1.0, after, [], None)


def run_cudnn(call: Call, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    weight, bias, groups, stride, padding, dilation = call
    if not relu:
        return run_plain(call, x, residual, relu)
    geometry = (stride, padding, dilation, groups)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        same = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return tuple(same) if conv.padding == "same" else (0, 0)
    return conv.padding
