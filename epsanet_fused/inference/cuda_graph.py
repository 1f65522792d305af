"""A whole model in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from epsanet_fused.inference.conv import refuse_transforms
from epsanet_fused.utils.hooks import has_hooks
from epsanet_fused.utils.tracked import state_of, track


class _Capture(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    states: list[Any]  # of the model's parameters and buffers


class GraphedModel(nn.Module):
    """A model that runs as a CUDA graph for inputs like the example's, and plainly for others.

    With hooks on it or in it, it runs plainly too.

    The graph is captured at the first call, and again after a parameter or buffer was written to,
    loaded or moved. It is neither copied nor pickled. The state_dict is that of ``model``.

    Args:
        model: in eval mode; returns one tensor.
        args: the tensors that it is called with.

    Raises:
        ValueError: if the model takes anything but tensors, or returns anything but one.
    """

    _capture: _Capture | None
    _tensors: list[Tensor]  # the parameters and buffers
    _modules_inside: tuple[nn.Module, ...]  # a tuple, which nn.Module doesn't register

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        super().__init__()
        if not all(isinstance(t, Tensor) for t in args):
            raise ValueError("optimize_for_inference: cuda_graph needs arguments that are tensors")
        self.model = model
        self.training = False
        self._signatures = tuple(_signature(t) for t in args)
        self._clear_capture()

    def forward(self, *args: Any) -> Tensor:
        """Replay the graph on these arguments, or call the model if they differ from the example's.

        Raises:
            ValueError: if the model doesn't return one tensor.
            RuntimeError: if a gradient is due.
        """
        same = tuple(_signature(t) for t in args) == self._signatures
        if not same or has_hooks(*self._modules_inside):  # hooks run in Python
            plain: Tensor = self.model(*args)
            return plain
        for arg in args:
            refuse_transforms(arg)
        states = [state_of(t) for t in self._tensors]
        capture = self._capture
        if capture is None or capture.states != states:
            capture = self._capture = self._capture_graph(args, states)
        with torch.no_grad():
            for static_input, arg in zip(capture.inputs, args, strict=True):
                static_input.copy_(arg)
        capture.graph.replay()
        return capture.output.clone()  # the next replay overwrites it

    def _capture_graph(self, args: tuple[Tensor, ...], states: list[Any]) -> _Capture:
        stream = torch.cuda.Stream()
        # A tensor that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            inputs = [t.clone() for t in args]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph, output = self._record(stream, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return _Capture(graph, inputs, output, states)

    def _record(
        self, stream: torch.cuda.Stream, inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        for _ in range(3):  # warm up
            output = self.model(*inputs)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"optimize_for_inference: cuda_graph needs a model that returns one tensor, "
                f"got {type(output).__name__}"
            )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = self.model(*inputs)
        return graph, output

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the state_dict of the model."""
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load a state_dict of the model."""
        result = self.model.load_state_dict(*args, **options)
        self._clear_capture()
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._clear_capture()
        return self

    def _clear_capture(self) -> None:
        self._capture = None
        self._tensors = [*self.model.parameters(), *self.model.buffers()]
        self._modules_inside = tuple(self.model.modules())
        for t in self._tensors:
            track(t)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_capture": None}


def _signature(t: Any) -> tuple[Any, ...]:
    if not isinstance(t, Tensor):
        return (type(t),)
    return t.shape, t.stride(), t.dtype, t.device
