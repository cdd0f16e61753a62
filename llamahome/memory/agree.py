"""One cut for all ranks: agreed on before a step, and a smaller one kept on disk when a rank ran out of memory.

Under FSDP a rank that fails inside a step leaves the others waiting in a collective, so the step cannot be replayed in
place: all exit, and the restart reads the smaller budget here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.files import write_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUDGET_FILE = "token_budget.json"


def agree_on_budget(budget: int, group: ProcessGroup | None = None) -> int:
    """The smallest of the ranks' token budgets; every rank of `group` (None: all) must call it before the same step.

    Without a process group it is `budget` itself. NCCL's groups compare on the current GPU.
    """
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return budget
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    smallest = torch.tensor(budget, dtype=torch.int64, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    return int(smallest)


def keep_smaller_budget(run: Path, tokens: int) -> int:
    """After an out-of-memory with `tokens` in a micro-batch: half of it, kept in the run's folder for the restart.

    A budget that is there already is never raised, so several ranks may write. Raises: StorageError.
    """
    budget = max(1, min(tokens // 2, kept_budget(run) or tokens))
    write_json(run / BUDGET_FILE, {"token_budget": budget})
    return budget


def kept_budget(run: Path) -> int | None:
    """The largest micro-batch, in tokens, that a restart may use; None where no rank ran out of memory."""
    try:
        return int(json.loads((run / BUDGET_FILE).read_bytes())["token_budget"])
    except FileNotFoundError:
        return None
