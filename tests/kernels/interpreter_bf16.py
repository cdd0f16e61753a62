"""Right bfloat16 arithmetic in Triton's interpreter (3.9), which works on the bit patterns as if they were integers.

`install()` decodes bfloat16 operands to float32, lets the interpreter compute, and rounds the result to nearest even,
as one GPU instruction does. `interpreted_shim.py` compares it with torch bit by bit, so that a changed Triton fails
there first. conftest.py installs it under TRITON_INTERPRET=1; nothing else has to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
# Arithmetic whose result has the type of its last operand: for a dot product that is the accumulator.
_ARITHMETIC = ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf", "create_dot")


def decode(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) -> float32, exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns, to nearest, ties to even; every NaN becomes torch's."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def install() -> None:
    """Replace the interpreter's arithmetic, casts, reductions and scans, once per process."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder.cast_impl, "__wrapped__"):
        return
    for name in _ARITHMETIC:
        setattr(builder, name, _arithmetic(getattr(builder, name)))
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _float_to_float(builder.create_fp_to_fp)
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _along_axis(operation.apply_impl)


def _is_bf16(x: object) -> bool:
    return isinstance(x, Handle) and not isinstance(x.dtype, tl.pointer_type) and x.dtype.scalar == tl.bfloat16


def _wide(x: object) -> object:
    return Handle(decode(x.data), tl.float32) if _is_bf16(x) else x


def _arithmetic(original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self, *operands):
        handles = [x for x in operands if isinstance(x, Handle)]
        selects = operands[-1] is np.where  # moves bits, and is right as it is
        if selects or not any(map(_is_bf16, handles)):
            return original(self, *operands)
        result = original(self, *map(_wide, operands)).data
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(encode(result), tl.bfloat16) if _is_bf16(handles[-1]) else Handle(result, handles[-1].dtype)

    return method


def _cast(original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self, source, target):
        if source.dtype.scalar == target.scalar:
            return Handle(source.data, target.scalar)
        if target.scalar == tl.bfloat16:
            return Handle(encode(source.data), tl.bfloat16)
        return original(self, _wide(source), target)

    return method


def _float_to_float(original: Callable) -> Callable:
    """Casts with a rounding mode; those from and to 8-bit types pass through float32."""

    @functools.wraps(original)
    def method(self, source, target, rounding):
        wanted, given = target.scalar, source.dtype.scalar
        if tl.bfloat16 not in (wanted, given):
            return original(self, source, target, rounding)
        if wanted == tl.bfloat16 and rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            bits = self.cast_impl(source, tl.float32).data.view(np.uint32)
            return Handle((bits >> 16).astype(np.uint16), tl.bfloat16)
        if given.primitive_bitwidth == 8:
            source = original(self, source, tl.float32, rounding)
        if wanted.primitive_bitwidth == 8:
            return original(self, _wide(source), target, rounding)
        return self.cast_impl(source, target)

    return method


def _along_axis(original: Callable) -> Callable:
    """Reductions and scans: accumulate in float32, round the result once."""

    @functools.wraps(original)
    def method(self, inputs):
        narrow = [_is_bf16(x.handle) for x in inputs]
        if not any(narrow):
            return original(self, inputs)
        wide = tuple(self.to_tensor(_wide(x.handle).data, _wide(x.handle).dtype) for x in inputs)
        result = original(self, wide)
        results = list(result) if isinstance(result, list | tuple) else [result]
        for i, (x, was_narrow) in enumerate(zip(results, narrow, strict=True)):
            if was_narrow:
                results[i] = self.to_tensor(encode(x.handle.data), tl.bfloat16)
        return type(result)(results) if isinstance(result, list | tuple) else results[0]

    return method
