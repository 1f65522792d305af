"""Report progress during long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(
    items: Sequence[Item], unit: str, describe: Callable[[Item], str]
) -> Iterator[tuple[int, Item]]:
    """Yield the items, numbered, and show on stderr which one is at work.

    Args:
        items: to yield.
        unit: the name of an item, for the progress bar.
        describe: returns the text to show for an item.

    Yields:
        ``(i, item)``. tqdm draws a bar; without it, there is a line for each item.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        for i, item in enumerate(items):
            print(f"[{i + 1}/{len(items)}] {describe(item)}", file=sys.stderr)
            yield i, item
        return
    with tqdm(items, file=sys.stderr, unit=unit) as bar:
        for i, item in enumerate(bar):
            bar.set_description(describe(item))
            yield i, item
