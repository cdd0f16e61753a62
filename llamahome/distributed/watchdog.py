"""Notices a rank that hangs or is gone, names it and the place where it stands, and ends all for a restart."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llamahome.distributed.ranks import Ranks, collectives_done

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)
EXIT_CODE = 8
STACKS = "stacks"
_MOST_SECONDS_BETWEEN_BEATS = 1.0


@dataclass
class Seen:
    """What is known of a rank: its last message, and since when neither a message nor progress has come."""

    message: dict[str, Any] = field(default_factory=dict)
    beat_at: float = 0.0

    def take(self, message: dict[str, Any], now: float) -> bool:
        """Whether the rank has come further since the last message."""
        if message.get("beat") != self.message.get("beat"):
            self.beat_at = now
        further = _place(message) != _place(self.message)
        self.message = message
        return further


def _place(message: dict[str, Any]) -> tuple[int, int]:
    return int(message.get("progress", -1)), int(message.get("collectives", -1))


class Watchdog:
    """A thread in every rank that tells the others once a second that it lives and how far it is.

    Rank 0 watches all, the others watch rank 0. A rank without a message for `seconds` is gone; when no rank comes any
    further for `seconds`, the one that has begun the fewest collectives is what the others wait for. The verdict
    reaches all: each writes the stacks of its threads to `folder/stacks/rank-N.txt` and ends its process with
    code 8, so that torchrun starts all again. `on_verdict` gets the message first, on the lowest rank that lives.

    The main thread reports with `progress`, and says with `patient` where it may take its time.
    """

    def __init__(
        self, ranks: Ranks, folder: Path, seconds: float, on_verdict: Callable[[str], None],
        leave: Callable[[int], None] = os._exit,
    ) -> None:  # fmt: skip
        assert ranks.store is not None
        self.ranks, self.folder, self.seconds = ranks, folder, seconds
        self._store: Store = ranks.store.clone()  # type: ignore[attr-defined]
        self._on_verdict, self._leave = on_verdict, leave
        self._interval = min(_MOST_SECONDS_BETWEEN_BEATS, seconds / 10)
        self._seen = {rank: Seen() for rank in (range(ranks.size) if ranks.is_main else (0,))}
        self._progress = self._beat = self._patience = 0
        self._further_at = 0.0
        self._main = threading.main_thread().ident
        self._process = process_name(os.getpid())
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=2 * self._interval)

    def progress(self) -> None:
        """The main thread has come a step further."""
        self._progress += 1

    @contextmanager
    def patient(self) -> Iterator[None]:
        """While the block runs, standing still is no fault (a rank that is gone is)."""
        self._patience += 1
        try:
            yield
        finally:
            self._patience -= 1
            self.progress()

    def silent(self) -> list[int]:
        """Ranks that have missed several messages, as far as this rank watches them."""
        now = time.monotonic()
        return [rank for rank, seen in self._seen.items() if seen.beat_at and now - seen.beat_at > 3 * self._interval]

    def _run(self) -> None:
        now = time.monotonic()
        self._further_at = now
        for seen in self._seen.values():
            seen.beat_at = now
        while not self._end.wait(self._interval):
            try:
                self._tell()
                verdict = self._verdict() or self._judge(time.monotonic())
            except RuntimeError as error:  # the store went away with its host: that host is what is wrong
                if self._end.is_set():
                    return
                verdict = {"message": f"rank {self.ranks.rank} lost the store of the group: {_first_line(error)}"}
            if verdict:
                self._obey(verdict)
                return

    def _tell(self) -> None:
        self._beat += 1
        message = {
            "beat": self._beat, "progress": self._progress, "collectives": collectives_done(), "at": self._where(),
            "patient": self._patience > 0, "host": socket.gethostname(), "pid": os.getpid(), "process": self._process,
        }  # fmt: skip
        self._store.set(f"beat/{self.ranks.rank}", json.dumps(message))

    def _where(self) -> str:
        """The innermost line of the main thread, and the innermost of this package if that is another."""
        frame = sys._current_frames().get(self._main or 0)
        places: list[str] = []
        while frame is not None and len(places) < 2:
            code = frame.f_code
            ours = "llamahome" in code.co_filename
            if not places or ours:
                places.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
            if ours:
                break
            frame = frame.f_back
        return " in ".join(places)

    def _verdict(self) -> dict[str, Any] | None:
        if not self._store.check(["verdict"]):
            return None
        found: dict[str, Any] = json.loads(self._store.get("verdict"))
        return found

    def _judge(self, now: float) -> dict[str, Any] | None:
        """A verdict on the ranks that this one watches, published to all; None while all is well."""
        for rank, seen in self._seen.items():
            known = self._store.check([f"beat/{rank}"])
            if known and seen.take(json.loads(self._store.get(f"beat/{rank}")), now):
                self._further_at = now
        gone = [rank for rank, seen in self._seen.items() if now - seen.beat_at > self.seconds]
        if gone:
            return self._publish(gone, f"has not answered for {self.seconds:g} s")
        patient = any(seen.message.get("patient", True) for seen in self._seen.values())
        if patient or not self.ranks.is_main:
            self._further_at = now if patient else self._further_at
            return None
        if now - self._further_at <= self.seconds:
            return None
        fewest = min(_place(seen.message)[1] for seen in self._seen.values())
        late = [rank for rank, seen in self._seen.items() if _place(seen.message)[1] == fewest]
        return self._publish(late, f"has come no further for {self.seconds:g} s")

    def _publish(self, blamed: list[int], why: str) -> dict[str, Any]:
        told = (self._seen[rank].message for rank in blamed)
        names = [
            f"rank {rank} (process {message.get('pid', '?')} on {message.get('host', '?')}) {why}, at "
            f"{message.get('at') or 'an unknown place'}" for rank, message in zip(blamed, told, strict=True)
        ]  # fmt: skip
        verdict = {"message": "; ".join(names[:4]), "blamed": blamed}
        self._store.set("verdict", json.dumps(verdict))
        return verdict

    def _obey(self, verdict: dict[str, Any]) -> None:
        """Leave the stacks and the message behind, and end this process."""
        blamed = verdict.get("blamed", [])
        try:
            (self.folder / STACKS).mkdir(parents=True, exist_ok=True)
            with (self.folder / STACKS / f"rank-{self.ranks.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.warning("no stacks written: %s", error)
        speaker = min(set(range(self.ranks.size)) - set(blamed), default=0)
        if self.ranks.rank == speaker:
            message = f"{verdict['message']}; stacks in {self.folder / STACKS}"
            logger.error("%s", message)
            self._on_verdict(message)
        else:
            time.sleep(2 * self._interval)  # the speaker writes first: torchrun ends all when one ends
        for rank in set(blamed) - {self.ranks.rank}:
            _kill_here(self._seen[rank].message if rank in self._seen else {})
        self._leave(EXIT_CODE)


def process_name(pid: int) -> str | None:
    """What no other process has, here or on another host, now or later; None where the system does not tell.

    The machine's boot, the space of process ids, the id, and when the process began, from Linux's /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path(f"/proc/{pid}/ns/pid").readlink()
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # field 22 of proc(5)
    except OSError:
        return None
    return f"{boot} {space} {pid} {began}"


def _kill_here(message: dict[str, Any]) -> None:
    """SIGKILL a rank of this host that stands still: torchrun would wait long for it to answer a SIGTERM."""
    pid, name = message.get("pid"), message.get("process")
    if pid is not None and name is not None and process_name(pid) == name:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
