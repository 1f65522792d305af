"""Annotations that torch.fx can save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])


def with_real_annotations(function: Function) -> Function:
    """Replace a function's annotations, which are strings, by the objects that they name.

    A graph that torch.fx traces keeps the annotations of forward's arguments, and can't be pickled
    if those are strings (as of PyTorch 2.13).
    """
    function.__annotations__ = get_type_hints(function)
    return function
