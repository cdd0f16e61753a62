"""Memory that runs out in the optimizer's step costs nothing, or ends the run before a weight is half changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llamahome.training.update import update_weights


def trained(names: tuple[str, ...], fail_at: int | None = None) -> tuple[Any, list[torch.Tensor]]:
    """An optimizer after two steps over one weight in each group; its first allocations of state may fail once."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in names]
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in weights], lr=0.1)
    made, zeros_like = [0], torch.zeros_like

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        made[0] += 1
        if made[0] == fail_at:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8")
        return zeros_like(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros_like", failing)
        for _ in range(2):
            for weight in weights:
                weight.grad = weight.detach().sin()
            update_weights(optimizer.step, optimizer)
    return optimizer, weights


@pytest.mark.parametrize("fail_at", [1, 2])
def test_state_that_was_half_made_is_made_anew(fail_at: int) -> None:
    """AdamW makes two moments for a weight; a retry over the first alone would miss the second."""
    optimizer, weights = trained(("one",), fail_at)
    expected, reference = trained(("one",))
    assert torch.equal(weights[0], reference[0])
    state, other = next(iter(optimizer.state.values())), next(iter(expected.state.values()))
    assert all(torch.equal(state[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_a_weight_that_was_changed_ends_it() -> None:
    """The first group is updated before the second one's state is made: a second try would update it twice."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trained(("one", "two"), fail_at=3)


def test_other_errors_are_not_tried_again() -> None:
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        update_weights(wrong, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    assert calls == [1]
