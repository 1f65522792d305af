"""Tensors that notice writes which their version counter doesn't count.

``tensor.data`` is an alias with a counter of its own. Averages of weights and pruning write through
it, so what was made from the tensor before would be out of date without a sign.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Reads and writes Tensor.data itself.
_DATA: Any = Tensor.data


class _Tracked:
    """Counts each use of ``data``, and knows whether an alias that it gave out is still in use."""

    data_uses: int = 0
    aliases: Sequence[weakref.ref[Tensor]] = ()

    @property
    def data(self) -> Tensor:
        """The alias that Tensor.data gives."""
        alias: Tensor = _DATA.__get__(self)
        self.data_uses += 1
        living = [ref for ref in self.aliases if ref() is not None]
        self.aliases = [*living, weakref.ref(alias)]
        return alias

    @data.setter
    def data(self, value: Tensor) -> None:
        self.data_uses += 1
        _DATA.__set__(self, value)


class TrackedParameter(_Tracked, nn.Parameter):
    """A parameter whose ``data`` is tracked; it is pickled as an ordinary parameter."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return how to make an ordinary parameter of it."""
        no_hooks: OrderedDict[str, Any] = OrderedDict()
        arguments = (self.detach(), self.requires_grad, no_hooks)
        return torch._utils._rebuild_parameter, arguments


class TrackedBuffer(_Tracked, Tensor):
    """A buffer whose ``data`` is tracked; copies and pickles of it are ordinary tensors."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # as nn.Parameter has it

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return an ordinary copy."""
        copied = memo[id(self)] = self.detach().clone()
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how to make an ordinary tensor of it."""
        return self.detach().__reduce_ex__(protocol)


# All tracked tensors, by id: tensors compare by their elements.
_tracked: dict[int, weakref.ref[Tensor]] = {}


def track(tensor: Tensor | None) -> None:
    """Make the tensor, and whoever holds it, notice uses of its ``data``."""
    if type(tensor) is nn.Parameter:
        tensor.__class__ = TrackedParameter
    elif type(tensor) is Tensor:
        tensor.__class__ = TrackedBuffer
    else:
        return
    key = id(tensor)
    _tracked[key] = weakref.ref(tensor, lambda _: _tracked.pop(key, None))


def untrack_all() -> None:
    """Make ordinary tensors of all tracked ones, which compilers don't know.

    ``state_of`` tells that this has happened, so that what was derived from them is made anew.
    """
    for ref in list(_tracked.values()):
        tensor = ref()
        if tensor is not None:
            kind = nn.Parameter if isinstance(tensor, TrackedParameter) else Tensor
            tensor.__class__ = kind
    _tracked.clear()


# torch.compile calls it while it traces, and takes its result, None, for a constant.
untrack_all._dynamo_marked_constant = True  # type: ignore[attr-defined]


def state_of(tensor: Tensor | None) -> Any:
    """Return a value that differs after each write to the tensor, and from itself if unknown."""
    if tensor is None:
        return None
    if not isinstance(tensor, _Tracked):
        return object()  # nobody would notice a use of its data
    aliases = tensor.aliases
    if aliases and any(ref() is not None for ref in aliases):
        return object()  # it may be written to at any time
    try:
        return tensor._version, tensor.data_uses
    except RuntimeError:  # a tensor of inference mode counts no writes
        return object()
