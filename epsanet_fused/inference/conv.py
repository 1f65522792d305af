"""A convolution for inference: how it is executed, apart from what it is."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsanet_fused.inference.conv_weights import fold, narrow, widen_weight
from epsanet_fused.nn.grouped_conv import ConvPlan, merge_weight, numeric_padding
from epsanet_fused.utils.memory_format import is_channels_last


class Call(NamedTuple):
    """One call of the library's convolution."""

    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


class Derived(nn.Module):
    """A module that takes the place of another one, and computes with tensors made from its.

    It has the parameters of the ``origin`` under the same names, so that a state_dict doesn't
    change. What it makes of them, and of those of a ``norm`` that stays where it is, is made again
    when one of them changes; it is neither saved nor copied.
    """

    def __init__(self, origin: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        for name, parameter in origin._parameters.items():  # None, too
            self.register_parameter(name, parameter)
        self.training = False
        # In a tuple, or it would be registered a second time.
        self._norms = () if norm is None else (norm,)
        self._forget()

    @property
    def norm(self) -> nn.Module | None:
        return self._norms[0] if self._norms else None

    def derive(self) -> Any:
        """Makes the tensors to compute with."""
        raise NotImplementedError

    def derived(self) -> Any:
        """What ``derive`` makes of the parameters as they are now."""
        tensors = [*self._parameters.values()]
        for norm in self._norms:
            tensors += (*norm._parameters.values(), *norm._buffers.values())
        versions = [0 if t is None or t.is_inference() else t._version for t in tensors]
        if versions != self._versions or not all(map(operator.is_, tensors, self._tensors)):
            with torch.inference_mode(False), torch.no_grad():
                self._derived = self.derive()
            self._tensors, self._versions = tensors, versions
        return self._derived

    def _forget(self) -> None:
        # The tensors themselves, since another one may come to have the same id.
        self._derived, self._tensors, self._versions = None, [], None

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_derived": None, "_tensors": [], "_versions": None}


class PlannedConv(Derived):
    """A Conv2d in inference, with what follows it: a BatchNorm2d, a residual, a ReLU.

    Args:
        conv: with zeros for its padding.
        norm: the BatchNorm2d that follows it, or None.
        plan: how to run it; None as it is, in ``memory_format``.
        memory_format: of what comes out.
        fold: make the norm part of the convolution's weights.
        fused_calls: use the library's own convolution + residual + relu where it has one; on CPUs,
            in channels_last, with weights in the order that oneDNN likes best.
        relu: a ReLU follows wherever it is called.

    Shape: (B, C, H, W) -> (B, K, H', W').
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        *,
        plan: ConvPlan | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        fold: bool = True,
        fused_calls: bool = True,
        relu: bool = False,
    ) -> None:
        super().__init__(conv, norm)
        self.plan = plan or ConvPlan(conv.groups, (1, 1), memory_format)
        self.memory_format = memory_format
        self.fold = fold
        self.fused_calls = fused_calls
        self.relu = relu
        self.groups, self.stride, self.dilation = conv.groups, conv.stride, conv.dilation
        self.padding = numeric_padding(conv)

    def derive(self) -> Call:
        weight, bias = fold(self.weight, self.bias, self.norm if self.fold else None)
        groups, (rows, columns), memory_format = self.plan
        weight = merge_weight(weight, self.groups, groups)
        if rows * columns > 1:
            weight = widen_weight(weight, groups, (rows, columns), self.stride)
            if bias is not None:
                bias = bias.view(groups, 1, -1).expand(-1, rows * columns, -1).flatten()
        stride = (self.stride[0] * rows, self.stride[1] * columns)
        dtype = self.weight.dtype
        # A copy also where nothing is folded, merged or cast: the source may be written to.
        weight = weight.to(dtype, memory_format=memory_format, copy=True)
        bias = None if bias is None else bias.to(dtype, copy=True)
        return Call(weight, bias, groups, stride, self.padding, self.dilation)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        overwrite: bool = False,
    ) -> Tensor:
        """relu(norm(conv(x)) + residual), each part where it is asked for.

        Args:
            overwrite: the residual's memory may be used for what comes out.
        """
        relu = relu or self.relu
        x = x.contiguous(memory_format=self.plan.memory_format)
        if self.norm is None or self.fold:
            out = self._convolve(x, residual, relu, overwrite)
        else:
            out = _then(self.norm(self._convolve(x, None, False, False)), residual, relu)
        return out.contiguous(memory_format=self.memory_format)

    def _convolve(self, x: Tensor, residual: Tensor | None, relu: bool, overwrite: bool) -> Tensor:
        if torch.compiler.is_compiling() or x.numel() == 0:
            # Compilers see a computation on parameters, which freezing does once and for all.
            call, run = self.derive(), run_plain
        else:
            call, run = self.derived(), run_plain
            if self.fused_calls:
                run = fused_call(x.device.type, x.dtype)
                # With packed weights what comes out is always channels_last.
                if run is run_onednn and self.plan.memory_format == torch.channels_last:
                    call = self._pack(call, x)
        if self.plan.tile == (1, 1):
            try:
                return run(call, x, residual, relu, overwrite)
            except NoEngineError:  # such as for three channels in 16 bits, perhaps
                out = run_plain(call, x, residual, relu)  # an error if the call itself is wrong
                self.fused_calls = False
                return out
        return _then(self._convolve_wide(call, run, x), residual, relu)

    def _convolve_wide(self, call: Call, run, x: Tensor) -> Tensor:
        sizes, extras = [], []
        geometry = zip(
            x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.plan.tile,
            strict=True,
        )  # fmt: skip
        for length, kernel, stride, padding, pixels in geometry:
            size = (length + 2 * padding - kernel) // stride + 1
            # Where tiles don't fit, a few more pixels on both sides, and then cut.
            sizes.append(size)
            extras.append((-size % pixels + 1) // 2)
        padding = [p + s * e for p, s, e in zip(self.padding, self.stride, extras, strict=True)]
        out = run(call._replace(padding=padding), x)
        return narrow(out, call.groups, self.plan.tile, extras, sizes)

    def _pack(self, call: Call, x: Tensor) -> Call:
        """The call with its weight in oneDNN's order for x; right for any other size, too."""
        if not call.weight.is_mkldnn:
            with torch.inference_mode(False), torch.no_grad():
                self._derived = call = _packed(call, x)
        return call


def _then(out: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out


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


class NoEngineError(RuntimeError):
    """cuDNN can't run this convolution and what follows it in one call."""


# Each of these gives relu(call(x) + residual), in the residual's memory if overwrite allows it.
def run_plain(
    call: Call,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    overwrite: bool = False,
) -> Tensor:
    weight, bias, groups, stride, padding, dilation = call
    return _then(F.conv2d(x, weight, bias, stride, padding, dilation, groups), residual, relu)


def run_onednn(
    call: Call,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    overwrite: bool = False,
) -> Tensor:
    weight, bias, groups, stride, padding, dilation = call
    geometry = (padding, stride, dilation, groups)
    # The overloads by name: to find them by their arguments takes several microseconds.
    pointwise = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        after = "relu" if relu else "none"
        return pointwise.default(x, weight, bias, *geometry, after, [], "")
    if groups > 1 or not is_channels_last(x):
        # It would add by a kernel that isn't there for 16 bits.
        out = pointwise.default(x, weight, bias, *geometry, "none", [], "")
        return _then(out, residual, relu)
    addition = (weight, bias, *geometry, "add", 1.0, "relu" if relu else None, [], None)
    if overwrite and residual.is_contiguous(memory_format=torch.channels_last):
        return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, *addition)
    return pointwise.binary(x, residual, *addition)


def run_cudnn(
    call: Call,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    overwrite: bool = False,
) -> Tensor:
    weight, bias, groups, stride, padding, dilation = call
    if not relu:
        return run_plain(call, x, residual)
    geometry = (stride, padding, dilation, groups)
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NoEngineError(str(error)) from error
