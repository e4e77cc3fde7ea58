"""A progress bar that leaves nothing behind: no text in a stored notebook, no line in a log."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress(items: Iterable, label: str, total: int | None = None) -> Any:
    """Iterate over `items` behind a bar that says `label`; TQDM_DISABLE=1 hides it, in notebooks too.

    `total` is the number of items where len(items) does not say it, as with a sampler's generator.
    """
    hidden = os.environ.get("TQDM_DISABLE") == "1"  # tqdm itself asks only where it draws in a terminal
    return tqdm(items, desc=label, total=total, leave=False, disable=hidden)
