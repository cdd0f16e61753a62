"""Writing down what the static gate compiles, shortly. Imports without Triton."""

from __future__ import annotations

from typing import Any

from llamahome.kernels.launch import StaticCase

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
