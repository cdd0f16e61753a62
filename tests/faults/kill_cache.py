"""Kill processes that fill, evict and clear a cache, at random moments and file operations; no entry may be half there.

    python tests/faults/kill_cache.py FOLDER KILLS SEED

After each kill every visible entry must be whole, and in a cache with room none that was finished may be gone.
"""

from __future__ import annotations

import random
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from killing import Moment, attempt

from llamahome.data.cache import Cache
from llamahome.data.store import TokenStore, TokenStoreWriter

KEYS = ("a", "b", "c", "d")
LONGEST = 0.06  # seconds until a kill by time; all four keys take about as long


def build(key: str, folder: Path) -> None:
    """A token store of some shards and a file beside it; the bytes follow from the key."""
    with TokenStoreWriter(folder / "train", 100, shard_bytes=300) as writer:
        for i in range(12):
            writer.append(np.full(20 + i, ord(key) - 90), np.ones(20 + i, np.bool_), i)
        writer.commit().close()
    (folder / "report.json").write_text(key * 1000)


def check(key: str, folder: Path) -> None:
    """Raises: DataError, AssertionError, OSError for what is not whole."""
    with TokenStore.open(folder / "train") as store:
        store.verify()
        assert len(store) == 12
    assert (folder / "report.json").read_text() == key * 1000


def use(cache: Cache, chance: random.Random) -> None:
    for key in chance.sample(KEYS, len(KEYS)):
        entry = cache.get(key, lambda folder, key=key: build(key, folder))
        check(key, entry.path)
        entry.close()
        if cache.max_bytes == 0:
            cache.clear() if chance.random() < 0.3 else cache.clean()


def entries(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.glob("[!.]*") if path.is_dir()}


def main() -> None:
    folder, kills, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    roomy = Cache(folder / "roomy", 1 << 40, 1e9, 0)
    tight = Cache(folder / "tight", 0, 1e9, 0)  # every clean-up evicts
    killed = 0
    while killed < kills:
        cache = chance.choice((roomy, tight))
        before = entries(cache)
        moment = Moment.draw(chance, longest=LONGEST, operations=120, below=cache.folder)
        killed += not attempt(partial(use, cache, random.Random(chance.random())), moment)
        for key in entries(cache):
            check(key, cache.folder / key)
        assert cache is tight or before <= entries(cache), "a finished entry was lost"
        if cache is roomy and len(before) == len(KEYS):
            shutil.rmtree(cache.folder)
    for cache in (roomy, tight):
        cache.clear()
        left = [path.name for path in cache.folder.glob("*") if path.name != ".cleaned" and path.suffix != ".lock"]
        assert not left, left
    print(f"{killed} kills: every entry whole, nothing left behind")


if __name__ == "__main__":
    main()
