"""See what a call changes besides its result: attributes of modules, and generators of numbers."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Snapshot(NamedTuple):
    """The attributes of some modules at one time.

    Attributes:
        attributes: the identity and contents of each attribute, by its name.
        held: the objects whose identities these are; no other object gets theirs meanwhile.
    """

    attributes: dict[str, object]
    held: list[object]


def take_snapshot(parts: Mapping[str, nn.Module]) -> Snapshot:
    """Record the attributes of ``parts``, and one level of what they hold."""
    found = Snapshot({}, [])
    for name, part in parts.items():
        for attribute, value in vars(part).items():
            # The values of buffers are restored after each run.
            inner = [] if attribute == "_buffers" else _contents(value)
            found.held.extend((value, *inner))
            identities = (_identity(value), *map(_identity, inner))
            found.attributes[f"{name}.{attribute}".lstrip(".")] = identities
    return found


def _contents(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, set, deque)):
        return list(value)
    if isinstance(value, Tensor):
        return []
    return list(getattr(value, "__dict__", {}).values())


def _identity(value: object) -> tuple[int, int]:
    """Return the id of an object, and how often it was written to if it is a tensor."""
    if isinstance(value, Tensor) and not value.is_inference():
        return id(value), value._version
    return id(value), 0


def changed_attribute(before: Snapshot, after: Snapshot) -> str | None:
    """Return the name of an attribute that differs in two snapshots."""
    for name in before.attributes | after.attributes:
        if before.attributes.get(name) != after.attributes.get(name):
            return name
    return None


def random_states() -> list[object]:
    """Return the states of the global generators of PyTorch, Python and, if loaded, NumPy."""
    states: list[object] = [torch.get_rng_state().tolist(), random.getstate()]
    numpy = _loaded_numpy()
    if numpy is not None:
        states.append(_comparable(numpy.random.get_state(legacy=False)))
    return states


@contextmanager
def unchanged_random_states(devices: Iterable[int] = ()) -> Iterator[None]:
    """Restore the states of the generators of PyTorch, Python and NumPy afterwards.

    Args:
        devices: the indices of the CUDA devices whose generators are restored, beside the CPU's.
    """
    state = random.getstate()
    numpy = _loaded_numpy()
    numpy_state = None if numpy is None else numpy.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _loaded_numpy() -> Any:
    return sys.modules.get("numpy")


def _comparable(state: Any) -> object:
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    return state.tobytes() if hasattr(state, "tobytes") else state
