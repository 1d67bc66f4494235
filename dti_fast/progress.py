"""Progress on stderr: a moving bar on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import track as bar

INTERVAL = 5.0  # seconds between two plain lines

T = TypeVar("T")


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Say what takes the time now."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.print(what, markup=False, soft_wrap=True)
    with console.status(what):
        yield


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one after another, with word on how many are done of `what`, such as "drawing"."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        yield from bar(items, what, console=console, disable=not items)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= INTERVAL:
            said = time.monotonic()
            console.print(f"{what}: {done} of {len(items)}", markup=False, soft_wrap=True)
        yield item
