"""Conv2d run as an equivalent convolution (merged groups, tiled pixels), fused with its successors.

``PlannedConv`` is the module; ``conv_runners.py`` has the ways to execute it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epsanet_fused.inference.conv_runners import (
    ConvCall,
    NoEngineError,
    Runner,
    add_relu,
    run_onednn,
    run_plain,
    select_runner,
)
from epsanet_fused.inference.conv_weights import fold_norm, tile_weight, untile
from epsanet_fused.nn.grouped_conv import ConvPlan, merge_weight, numeric_padding
from epsanet_fused.ops.derivatives import has_tangent
from epsanet_fused.utils.annotations import with_real_annotations
from epsanet_fused.utils.memory_format import MEMORY_FORMATS, memory_format_name
from epsanet_fused.utils.replacing import take_state
from epsanet_fused.utils.tracked import state_of, track, untrack_all


class _Cached(NamedTuple):
    """What was computed from tensors, and these tensors and their states at that time.

    The tensors, not their ids: Python may give the id of a freed tensor to another one.
    """

    weights: Any
    sources: list[Tensor | None]
    states: list[Any]


class CachedWeights(nn.Module):
    """A module that replaces another one and computes with tensors made from its parameters.

    It has the state of ``origin``. ``cached_weights`` calls ``compute_weights`` again when a
    tensor of ``origin`` or of ``norm``, or the norm's eps, has changed. The cache is neither saved
    nor copied.

    Args:
        origin: the module to replace.
        norm: the norm whose parameters ``compute_weights`` reads, or None. It stays registered
            where it is.
    """

    _norms: tuple[nn.Module, ...]
    _cached: _Cached | None

    def __init__(self, origin: nn.Module, norm: nn.Module | None) -> None:
        take_state(self, origin, type(self))
        self.training = False
        # A tuple hides the norm from nn.Module, which would register it a second time.
        self._norms = () if norm is None else (norm,)
        self._clear_cache()

    @property
    def norm(self) -> Any:
        """The norm that follows, or None."""
        return self._norms[0] if self._norms else None

    def compute_weights(self) -> Any:
        """Compute the tensors to run with from the parameters."""
        raise NotImplementedError

    def reads_norm(self, norm: Any) -> bool:
        """Return whether ``norm``, None included, is the one that is read, and in eval mode."""
        if norm is None or not self._norms:
            return norm is None and not self._norms
        is_in_eval = not norm.training and norm._buffers.get("running_mean") is not None
        return norm is self._norms[0] and is_in_eval

    def cached_weights(self) -> Any:
        """Return the result of ``compute_weights`` for the parameters as they are now."""
        return self._current().weights

    def _current(self) -> _Cached:
        sources: list[Tensor | None] = [*self._parameters.values()]
        for norm in self._norms:
            sources += norm._parameters.values()
            sources += [b for n, b in norm._buffers.items() if n != "num_batches_tracked"]
        eps = self._norms[0].eps if self._norms else None
        states = [eps, *map(state_of, sources)]
        cached = self._cached  # one read: another thread may put a new one there
        if (
            cached is None
            or states != cached.states
            or not all(map(operator.is_, sources, cached.sources))
        ):
            for t in sources:
                track(t)
            states = [eps, *map(state_of, sources)]
            with torch.inference_mode(False), torch.no_grad():
                cached = _Cached(self.compute_weights(), sources, states)
            self._cached = cached
        return cached

    def own_parameters(self) -> Iterator[Tensor | None]:
        """Yield the parameters of this module and of its norm."""
        for module in (self, *self._norms):
            yield from module._parameters.values()

    def _clear_cache(self) -> None:
        self._cached = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._clear_cache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}


def refuse_transforms(x: Tensor, parameters: Iterable[Tensor | None] = ()) -> None:
    """Raise a RuntimeError if a gradient or tangent is due, or if ``torch.func.vmap`` runs this.

    The derived weights and the library's own calls have no rule for these.

    Args:
        x: the input.
        parameters: they are read only where gradients are enabled or a transform is on.
    """
    if torch._C._are_functorch_transforms_active():
        parameters = list(parameters)
        is_batched = torch._C._functorch.is_batchedtensor
        if any(is_batched(t) for t in (x, *parameters) if t is not None):
            raise RuntimeError(
                "a model from optimize_for_inference can't run under torch.func.vmap; pass it the "
                "whole batch, or transform the model that it was made from"
            )
    is_due = torch.is_grad_enabled() and (
        x.requires_grad or any(p is not None and p.requires_grad for p in parameters)
    )
    if is_due or has_tangent((x,)):
        raise RuntimeError(
            "a model from optimize_for_inference has no gradients; call it under torch.no_grad(), "
            "or differentiate the model that it was made from"
        )


class PlannedConv(CachedWeights):
    """A Conv2d for inference, with an optional BatchNorm2d, residual and ReLU after it.

    A call computes the convolution alone, as the Conv2d does; ``run`` computes all of it.

    Args:
        conv: a convolution that ``is_plain_conv`` accepts.
        norm: the BatchNorm2d that follows it, or None.
        plan: how to run it; None runs it unchanged, in ``memory_format``.
        memory_format: of the output.
        fold: fold the norm into the convolution's weights.
        fused_calls: use the library's own convolution + residual + ReLU where it has one; on CPUs,
            in channels_last, with weights in oneDNN's packed order.

    Shape: (B, C, H, W) -> (B, K, H', W').
    """

    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    padding_mode: str

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None = None,
        *,
        plan: ConvPlan | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        fold: bool = True,
        fused_calls: bool = True,
    ) -> None:
        super().__init__(conv, norm)
        self.plan = plan or ConvPlan(conv.groups, (1, 1), memory_format)
        self.memory_format = memory_format
        self.fold = fold
        self.fused_calls = fused_calls

    def reads_layers(self, norm: nn.Module | None = None) -> bool:
        """Return whether ``run`` computes this convolution and ``norm``, the module behind it.

        False if somebody has changed the weight's or the norm's place since, or their modes. Hooks
        are not looked for.
        """
        if (
            "weight" not in self._parameters
            or "weight" in self.__dict__
            or self._modules  # a parametrisation
            or self.padding_mode != "zeros"
        ):
            return False
        return self.reads_norm(norm)

    def compute_weights(self) -> ConvCall:
        """Fold the norm, merge the groups and tile the weight, as planned."""
        weight, bias = fold_norm(self.weight, self.bias, self.norm if self.fold else None)
        groups, (rows, columns), memory_format = self.plan
        weight = merge_weight(weight, self.groups, groups)
        if rows * columns > 1:
            weight = tile_weight(weight, groups, (rows, columns), self.stride)
            if bias is not None:
                bias = bias.view(groups, 1, -1).expand(-1, rows * columns, -1).flatten()
        stride = (self.stride[0] * rows, self.stride[1] * columns)
        dtype = self.weight.dtype
        # Copy even if nothing was folded, merged or cast: the parameter may be written to later.
        weight = weight.to(dtype, memory_format=memory_format, copy=True)
        bias = None if bias is None else bias.to(dtype, copy=True)
        return ConvCall(weight, bias, groups, stride, numeric_padding(self), self.dilation)

    def __getstate__(self) -> dict[str, Any]:
        # torch.save's default protocol can't write a torch.memory_format.
        return super().__getstate__() | {"memory_format": memory_format_name(self.memory_format)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"memory_format": MEMORY_FORMATS[state["memory_format"]]})

    @with_real_annotations
    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` (B, C, H, W), without the norm, as the Conv2d does.

        Raises:
            RuntimeError: if a gradient is due.
        """
        if self.reads_layers():
            return self.run(x)
        refuse_transforms(x, self.own_parameters())
        out: Tensor = nn.Conv2d._conv_forward(self, x, self.weight, self.bias)  # type: ignore[arg-type]
        return out

    def run(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        overwrite: bool = False,
    ) -> Tensor:
        """Return relu(norm(conv(x)) + residual).

        Args:
            x: (B, C, H, W).
            residual: (B, K, H', W'), or None to add nothing.
            relu: apply the ReLU.
            overwrite: allow the output to be written to the residual's memory.

        Raises:
            RuntimeError: if a gradient is due.
        """
        if torch.compiler.is_compiling():
            untrack_all()
        refuse_transforms(x, self.own_parameters())
        x = x.contiguous(memory_format=self.plan.memory_format)
        if self.fold or not self._norms:
            out = self._convolve(x, residual, relu, overwrite)
        else:
            out = add_relu(self.norm(self._convolve(x)), residual, relu)
        return out.contiguous(memory_format=self.memory_format)

    def _convolve(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        overwrite: bool = False,
    ) -> Tensor:
        if torch.jit.is_tracing():
            # A trace runs elsewhere, and ONNX in another library: no plan and no packed weights.
            weight, bias = fold_norm(self.weight, self.bias, self.norm if self.fold else None)
            dtype = self.weight.dtype
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            geometry = (self.stride, numeric_padding(self), self.dilation)
            return run_plain(ConvCall(weight, bias, self.groups, *geometry), x, residual, relu)
        call, run = self._prepare(x)
        if self.plan.tile != (1, 1):
            return add_relu(self._convolve_tiled(call, run, x), residual, relu)
        try:
            return run(call, x, residual, relu, overwrite)
        except NoEngineError:
            out = run_plain(call, x, residual, relu)  # raises if the arguments are wrong
            self.fused_calls = False
            return out

    def _prepare(self, x: Tensor) -> tuple[ConvCall, Runner]:
        """Return the call for ``x`` and the function that runs it."""
        if torch.compiler.is_compiling() or x.numel() == 0:
            # Compilers see computations on parameters, which freezing evaluates once.
            return self.compute_weights(), run_plain
        if x.dtype != self.weight.dtype:  # autocast casts for PyTorch's own
            return self.compute_weights(), run_plain
        cached = self._current()
        call: ConvCall = cached.weights
        if not self.fused_calls:
            return call, run_plain
        run = select_runner(x.device.type, x.dtype)
        # With a packed weight the output is always channels_last.
        packs = run is run_onednn and self.plan.memory_format == torch.channels_last
        if packs and not call.weight.is_mkldnn:
            with torch.inference_mode(False), torch.no_grad():
                call = _pack(call, x)
            if self._cached is cached:  # else another thread has found newer parameters
                self._cached = cached._replace(weights=call)
        return call, run

    def _convolve_tiled(self, call: ConvCall, run: Runner, x: Tensor) -> Tensor:
        """Run the tiled convolution and put its pixels in their places."""
        sizes, margins = [], []
        geometry = zip(
            x.shape[2:],
            self.weight.shape[2:],
            self.stride,
            call.padding,
            self.plan.tile,
            strict=True,
        )
        for length, kernel, stride, padding, pixels in geometry:
            size = (length + 2 * padding - kernel) // stride + 1
            sizes.append(size)
            # Where whole tiles do not fit, compute more pixels on both sides and cut them off.
            margins.append((-size % pixels + 1) // 2)
        widths = zip(call.padding, self.stride, margins, strict=True)
        padded = call._replace(padding=tuple(p + s * m for p, s, m in widths))
        return untile(run(padded, x), call.groups, self.plan.tile, margins, sizes)


def _pack(call: ConvCall, x: Tensor) -> ConvCall:
    """Return the call with its weight in oneDNN's order for x, which serves other sizes as well."""
    size = [x.shape[0], call.weight.shape[1] * call.groups, *x.shape[2:]]
    geometry = (call.padding, call.stride, call.dilation, call.groups)
    weight = torch.ops.mkldnn._reorder_convolution_weight(call.weight, *geometry, size)
    return call._replace(weight=weight)
