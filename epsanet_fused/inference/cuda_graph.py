"""A whole model in one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class GraphedModel(nn.Module):
    """Replays a CUDA graph of a model for inputs like the example's, and calls it for others.

    Args:
        model: in eval mode; it returns one tensor. Its state_dict is this module's.
        args: the tensors it is called with.

    The graph is captured when first needed, and again when a parameter was written to, loaded or
    moved. It isn't copied or pickled.

    Raises:
        ValueError: if the model takes anything but tensors, or returns anything but one.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        super().__init__()
        if not all(isinstance(t, Tensor) for t in args):
            raise ValueError("optimize_for_inference: cuda_graph needs arguments that are tensors")
        self.model = model
        self.training = False
        self._like = tuple(_signature(t) for t in args)
        self._tensors = [*model.parameters(), *model.buffers()]
        self._graph: tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor, list[int]] | None = None

    def forward(self, *args: Any) -> Tensor:
        if tuple(_signature(t) for t in args) != self._like:
            return self.model(*args)
        versions = [0 if t.is_inference() else t._version for t in self._tensors]
        if self._graph is None or self._graph[3] != versions:
            self._graph = (*self._capture(args), versions)
        graph, inputs, output, _ = self._graph
        with torch.no_grad():
            for mine, given in zip(inputs, args, strict=True):
                mine.copy_(given)
        graph.replay()
        return output.clone()  # the next replay writes over it

    def _capture(
        self, args: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        stream = torch.cuda.Stream()
        # What is made in inference mode couldn't be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            inputs = [t.clone() for t in args]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph, output = self._record(stream, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return graph, inputs, output

    def _record(
        self, stream: torch.cuda.Stream, inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        for _ in range(3):
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
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        result = self.model.load_state_dict(*args, **options)
        self._forget()
        return result

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _forget(self) -> None:
        self._graph = None
        self._tensors = [*self.model.parameters(), *self.model.buffers()]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_graph": None}


def _signature(t: Any) -> tuple[Any, ...]:
    if not isinstance(t, Tensor):
        return (type(t),)
    return t.shape, t.stride(), t.dtype, t.device
