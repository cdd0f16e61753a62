"""What neither the interpreter nor the compiler tells of a Triton kernel, read from its source.

Each rule is a function from a parsed file to lines of fault, and has a snippet that it must catch.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "kernels").glob("*_triton.py"))
STRIDE = re.compile(r"stride|_(row|head|token|rows)$|^(size|T|rank|heads)$")
GONE = {"make_block_ptr", "advance"}  # removed from Triton 3.9
GONE_ARGUMENTS = {"trans_a", "trans_b"}
FLOATS = {"eps", "scale", "scaling", "dropout", "softcap", "offset", "z_loss", "smoothing"}
FLOAT_CONSTEXPR = {"SOFTCAP"}  # a constant of the model, which the compiler folds into its polynomial


def jit_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list)
    ]


def calls(node: ast.AST, name: str) -> Iterator[ast.Call]:
    """Calls of `tl.<name>`."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"tl.{name}":
            yield call


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def parameters(function: ast.FunctionDef, *, constexpr: bool) -> set[str]:
    marked = {a.arg for a in function.args.args if a.annotation and "constexpr" in ast.unparse(a.annotation)}
    return marked if constexpr else {a.arg for a in function.args.args} - marked


def helpers(tree: ast.Module) -> set[str]:
    """Jit functions that others call; the rest are kernels."""
    functions = jit_functions(tree)
    inner = (node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call))
    return {ast.unparse(call.func) for call in inner} & {function.name for function in functions}


def launches(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls of the form `kernel[grid](...)`."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
            yield call


def assignments(function: ast.FunctionDef) -> Iterator[tuple[set[str], ast.expr]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            yield set().union(*(names(target) for target in node.targets)), node.value
        elif isinstance(node, ast.AugAssign):
            yield names(node.target), node.value


def masked_loads_without_other(tree: ast.Module) -> Iterator[str]:
    """On a GPU such an element is anything; the interpreter gives 0."""
    for function in jit_functions(tree):
        for call in calls(function, "load"):
            given = {keyword.arg for keyword in call.keywords}
            if ("mask" in given or len(call.args) > 1) and "other" not in given and len(call.args) < 3:
                yield f"{call.lineno}: a masked tl.load without other="


def scalars_cast_by_method(tree: ast.Module) -> Iterator[str]:
    """A scalar argument is a Python number in the interpreter and has no `.to`; tl.cast works in both."""
    for function in jit_functions(tree):
        if function.name in helpers(tree):
            continue
        scalars = {name for name in parameters(function, constexpr=False) if not name.endswith("_ptr")}
        scalars -= set().union(*(targets for targets, _ in assignments(function)))
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "to":
                value = call.func.value
                if names(value) and names(value) <= scalars:
                    yield f"{call.lineno}: {ast.unparse(call)}; use tl.cast"


def libdevice(tree: ast.Module) -> Iterator[str]:
    """The interpreter cannot call it, and AMD has another one."""
    for node in ast.walk(tree):
        named = isinstance(node, ast.Name | ast.Import | ast.ImportFrom) and "libdevice" in ast.unparse(node)
        if named or (isinstance(node, ast.Attribute) and node.attr == "libdevice"):
            yield f"{node.lineno}: libdevice"


def removed_from_triton(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in GONE:
            yield f"{node.lineno}: tl.{node.attr} is gone"
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in GONE_ARGUMENTS:
                    yield f"{node.lineno}: {keyword.arg}= is gone"


def floats_as_constexpr(tree: ast.Module) -> Iterator[str]:
    """Each new value would compile the kernel again."""
    for function in jit_functions(tree):
        for argument, default in zip(function.args.args[::-1], function.args.defaults[::-1], strict=False):
            if isinstance(default, ast.Constant) and isinstance(default.value, float):
                yield f"{function.lineno}: {argument.arg} has a float as default"
        for name in parameters(function, constexpr=True) & FLOATS:
            yield f"{function.lineno}: {name} is a constexpr"
    for call in launches(tree):
        for keyword in call.keywords:
            value = keyword.value
            is_float = isinstance(value, ast.Constant) and isinstance(value.value, float)
            named = isinstance(value, ast.Name) and value.id in FLOATS
            if (is_float or named) and keyword.arg and keyword.arg.isupper() and keyword.arg not in FLOAT_CONSTEXPR:
                yield f"{call.lineno}: {keyword.arg} gets a float"


def narrow_offsets(tree: ast.Module) -> Iterator[str]:
    """An index times a stride in an address, in 32 bits: wrong past 2^31 elements, and no test is that large."""
    functions = {function.name: function for function in jit_functions(tree)}
    wide_parameters = {name: parameters(functions[name], constexpr=False) for name in helpers(tree)}
    for _ in functions:  # what a helper is given is as wide as the narrowest argument of its calls
        for function in functions.values():
            wide = wide_names(function, wide_parameters.get(function.name, set()))
            for call in ast.walk(function):
                helper = functions.get(ast.unparse(call.func)) if isinstance(call, ast.Call) else None
                if helper is not None and helper.name in wide_parameters:
                    for argument, value in zip(helper.args.args, call.args, strict=False):
                        if not is_wide(value, wide):
                            wide_parameters[helper.name].discard(argument.arg)
    for function in functions.values():
        wide = wide_names(function, wide_parameters.get(function.name, set()))
        yield from narrow_products(function, wide)


def is_wide(node: ast.expr, wide: set[str]) -> bool:
    return bool(names(node) & wide) or "tl.int64" in ast.unparse(node)


def is_small(node: ast.expr, small: set[str]) -> bool:
    """Made of constants and positions within a tile alone."""
    return names(node) <= small and not list(calls(node, "program_id"))


def wide_names(function: ast.FunctionDef, known: set[str]) -> set[str]:
    wide = set(known)
    for _ in range(2):
        for targets, value in assignments(function):
            if is_wide(value, wide) and not list(calls(value, "load")):
                wide |= targets
    return wide


def narrow_products(function: ast.FunctionDef, wide: set[str]) -> Iterator[str]:
    constant = parameters(function, constexpr=True)
    strides = {name for name in parameters(function, constexpr=False) if STRIDE.search(name)}
    values = list(assignments(function))
    small = constant | {"tl"}
    small |= {name for targets, value in values for name in targets if is_small(value, small)}
    reached = set().union(*(names(call.args[0]) for kind in ("load", "store") for call in calls(function, kind)), set())
    addresses = [call.args[0] for kind in ("load", "store") for call in calls(function, kind)]
    for _ in values:
        for targets, value in values:
            if targets & reached and value not in addresses:
                addresses.append(value)
                reached |= names(value)
    products = {node for a in addresses for node in ast.walk(a) if isinstance(node, ast.BinOp)}
    for node in sorted(products, key=lambda node: node.lineno):
        if not isinstance(node.op, ast.Mult):
            continue
        left, right = node.left, node.right
        index = left if names(right) & strides else right if names(left) & strides else None
        if index is not None and not is_wide(node, wide) and not is_small(index, small):
            yield f"{node.lineno}: {ast.unparse(node)} in 32 bits"


RULES = (
    masked_loads_without_other, scalars_cast_by_method, libdevice, removed_from_triton, floats_as_constexpr,
    narrow_offsets,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_kernels_keep_the_rule(path, rule):
    assert list(rule(ast.parse(path.read_text("utf-8")))) == []


KERNEL = """
@triton.jit
def helper(x_ptr, row, x_stride, BLOCK: tl.constexpr):
    return tl.load(x_ptr + row * x_stride + tl.arange(0, BLOCK))

@triton.jit
def kernel(x_ptr, y_ptr, size, x_stride, eps, BLOCK: tl.constexpr{parameter}):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    near = helper(x_ptr, row, x_stride, BLOCK)
    {line}

def launch(x, y, eps):
    kernel[(1,)](x, y, x.shape[1], x.stride(0), eps, {argument}BLOCK=16)
"""
GOOD = (
    "x = tl.load(x_ptr + row * x_stride + column, mask=column < size, other=0.0) + tl.cast(eps, tl.float32)",
    "x = tl.load(x_ptr + column, column < size, 0.0).to(tl.float32)",
    "x = tl.load(x_ptr + row * size + column[:, None] * x_stride)",
    "x = tl.dot(helper(x_ptr, row, x_stride, BLOCK), column.T)",
)
BAD = (
    (masked_loads_without_other, "x = tl.load(x_ptr + column, mask=column < size)"),
    (masked_loads_without_other, "x = tl.load(x_ptr + column, column < size)"),
    (scalars_cast_by_method, "x = eps.to(tl.float32)"),
    (scalars_cast_by_method, "x = (eps * 2.0).to(tl.float32)"),
    (libdevice, "x = tl.extra.libdevice.tanh(near)"),
    (libdevice, "x = libdevice.tanh(near)"),
    (removed_from_triton, "x = tl.load(tl.make_block_ptr(x_ptr, (size,), (1,), (0,), (BLOCK,), (0,)))"),
    (removed_from_triton, "x = tl.dot(column, column, trans_b=True)"),
    (narrow_offsets, "x = tl.load(x_ptr + tl.program_id(0) * x_stride + column)"),
    (narrow_offsets, "at = tl.program_id(1) * size + column; x = tl.load(x_ptr + at)"),
    (narrow_offsets, "tl.store(y_ptr + (tl.program_id(1) * BLOCK + column)[:, None] * x_stride, 0.0)"),
    (narrow_offsets, "x = helper(x_ptr, tl.program_id(0), x_stride, BLOCK)"),
)


def parsed(line: str = "pass", parameter: str = "", argument: str = "") -> ast.Module:
    return ast.parse(KERNEL.format(line=line, parameter=parameter, argument=argument))


@pytest.mark.parametrize(("rule", "line"), BAD)
def test_a_rule_catches_what_it_is_for(rule, line):
    assert len(list(rule(parsed(line)))) == 1


@pytest.mark.parametrize("line", GOOD)
def test_no_rule_catches_what_is_right(line):
    assert [fault for rule in RULES for fault in rule(parsed(line))] == []


@pytest.mark.parametrize(
    "source",
    [
        parsed(parameter=", scale: tl.constexpr = 1"),
        parsed(parameter=", EPS: tl.constexpr = 1e-5"),
        parsed(parameter=", EPS: tl.constexpr", argument="EPS=1e-5, "),
        parsed(parameter=", EPS: tl.constexpr", argument="EPS=eps, "),
    ],
    ids=["name", "default", "number", "variable"],
)
def test_a_float_as_constexpr_is_caught(source):
    assert len(list(floats_as_constexpr(source))) == 1


def test_every_kernel_has_static_cases():
    trees = [ast.parse(path.read_text("utf-8")) for path in FILES]
    launched = {ast.unparse(call.func.value).split(".")[-1] for tree in trees for call in launches(tree)}
    defined = {function.name for tree in trees for function in jit_functions(tree)}
    makers = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    text = "\n".join(ast.unparse(maker) for maker in makers if "StaticCase" in ast.unparse(maker))
    assert launched & defined
    assert {name for name in launched & defined if not re.search(rf"\b{name}\b", text)} == set()


def test_the_other_files_import_without_triton():
    modules = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path not in FILES)
    code = f"""
import importlib, sys
sys.modules["triton"] = None  # import raises ImportError
for name in {modules}:
    importlib.import_module("llamahome.kernels." + name)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert "attention" in modules
