"""Writing down what the static gate compiles, shortly. Imports without Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llamahome.kernels.launch import LaunchConfig, StaticCase, candidates

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")


def static_case(
    name: str, kernel: Any, types: str, constants: dict[str, Any], *, num_warps: int, num_stages: int = 3,
    archs: tuple[str, ...] = ARCHS,
) -> StaticCase:  # fmt: skip
    """A case from the types of the kernel's arguments in order, "-" for a pointer that is None; then its constants.

    `constants` may hold `num_warps`, as a launch's keyword arguments do; it is left out.
    """
    constants = {key: value for key, value in constants.items() if key not in ("num_warps", "num_stages")}
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    given = dict(zip(arguments, types.split(), strict=True))
    absent = {argument: None for argument, kind in given.items() if kind == "-"}
    signature = {
        argument: "constexpr" if argument in constants or argument in absent else given[argument]
        for argument in kernel.arg_names
    }
    return StaticCase(name, kernel, signature, constants | absent, num_warps, num_stages, archs)


def table_cases(
    name: str, kernel: Any, types: str, row: tuple[str, str], constants: Callable[[LaunchConfig], dict[str, Any]]
) -> list[StaticCase]:
    """A case for each architecture, launched as the row (kernel, shape class) of the launch table says."""
    cases = []
    for arch in ARCHS:
        (config,) = candidates(*row, arch)  # a second one would need a name of its own
        given = {"num_warps": config.num_warps, "num_stages": config.num_stages} | constants(config)
        warps, stages = given["num_warps"], given["num_stages"]
        cases.append(
            static_case(f"{name}_{arch}", kernel, types, given, num_warps=warps, num_stages=stages, archs=(arch,))
        )
    return cases
