"""How ranks find each other through a store that may still hold what an earlier start of the group has left there."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_POLL_SECONDS = 0.02


def meet(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that only this start of the group has, the same on all ranks.

    torchrun keeps one store through its restarts (torch 2.13): under the old names a rank would find the addresses of
    processes that are gone, and wait for them. Each rank says a word of its own; rank 0 answers it with the name, under
    the word, until all have taken it: a word that is left from before is answered too, and hurts nobody.

    Raises: RuntimeError when not all have met within `timeout`.
    """
    word = uuid.uuid4().hex
    store.set(f"word/{rank}", word)
    if rank == 0:
        _answer(store, word, size, timeout)
        return word
    store.wait([f"name/{word}"], timeout)
    name: str = store.get(f"name/{word}").decode()
    store.set(f"taken/{name}/{rank}", "")
    return name


def _answer(store: Store, name: str, size: int, timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    missing, answered = set(range(1, size)), set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"taken/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"word/{rank}"]) and (word := store.get(f"word/{rank}").decode()) not in answered:
                store.set(f"name/{word}", name)
                answered.add(word)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"no word from rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(_POLL_SECONDS)
