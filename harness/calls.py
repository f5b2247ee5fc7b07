"""Says in words what a test called: `in_batch_softmax_loss(user[4, 8], item[4, 8], ...)`.

Read from the test's own source and the values in its frame, so that authors do not write it twice.
"""

from __future__ import annotations

import ast
import linecache
from dataclasses import dataclass
from types import FrameType
from typing import Any

PACKAGE = "recsys."
LONGEST = 40  # of one argument
FEW = 6  # numbers of a tensor that is shown whole


@dataclass(frozen=True)
class Call:
    """A call of learner code: its text, and the called name as the test wrote it."""

    text: str
    name: str


def last_call(frame: FrameType, line: int | None = None) -> Call | None:
    """The last call of learner code in `frame` up to `line`, or None if none is seen."""
    line = line or frame.f_lineno
    values = {**frame.f_globals, **frame.f_locals}
    best: ast.Call | None = None
    for statement in statements(frame.f_code.co_filename, frame.f_code.co_firstlineno):
        if statement.lineno > line:
            break
        if statement.lineno == line and isinstance(statement, ast.With):
            line = statement.end_lineno or line  # it is at its head again when it ends
        for node in outermost(statement, values):
            best = node
            break
    return Call(text_of(best, values), name_of(best.func, values)) if best else None


def seen(frame: FrameType, line: int | None = None) -> Call | None:
    """`last_call`, or None where it stumbles: a message must never be what fails."""
    try:
        return last_call(frame, line)
    except Exception:
        return None


_parsed: dict[str, tuple[list[str], dict[int, list[ast.stmt]]]] = {}  # by file; once, not per call


def statements(filename: str, first: int) -> list[ast.stmt]:
    """The simple statements, and the heads of compound ones, of the function at line `first`."""
    lines = linecache.getlines(filename)
    if filename not in _parsed or _parsed[filename][0] is not lines:  # another list: read anew
        _parsed[filename] = (lines, functions("".join(lines)))
    return _parsed[filename][1].get(first, [])


def functions(source: str) -> dict[int, list[ast.stmt]]:
    """The statements of each function in `source`, by the line that the function begins at."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {}
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            inner = [each for each in ast.walk(node) if isinstance(each, ast.stmt)][1:]
            found[start] = sorted(inner, key=lambda each: (each.lineno, each.col_offset))
    return found


def outermost(node: ast.AST, values: dict[str, Any]) -> list[ast.Call]:
    """Calls of learner code in one statement, the first one first, not those inside another."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            continue  # of a compound statement: seen by itself
        if isinstance(child, ast.Call) and is_learner(child.func, values):
            found.append(child)
        else:
            found += outermost(child, values)
    return found


def is_learner(func: ast.expr, values: dict[str, Any]) -> bool:
    """Whether `func` is a name from a learner module, or a method of a learner class."""
    if isinstance(func, ast.Name):
        return is_ours(values.get(func.id))
    if not (isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name)):
        return False
    owner = values.get(func.value.id)
    if type(owner).__name__ == "Learner":
        return True
    method = getattr(owner if isinstance(owner, type) else type(owner), func.attr, None)
    return is_ours(owner) and is_ours(method)


def is_ours(value: Any) -> bool:
    """Whether a function, class or instance is defined in `recsys`, the provided data apart."""
    module = getattr(value, "__module__", None) or ""
    return isinstance(module, str) and module.startswith(PACKAGE) and ".data." not in module


def name_of(func: ast.expr, values: dict[str, Any]) -> str:
    """`in_batch_softmax_loss`, or `EmbeddingTable.bag` for the method of an instance."""
    if isinstance(func, ast.Name):
        value = values.get(func.id)
        named = getattr(value, "__qualname__", None)
        return named or type(value).__qualname__ + (
            ".forward" if hasattr(value, "forward") else ".__call__"
        )
    assert isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name)
    owner = values.get(func.value.id)
    if type(owner).__name__ == "Learner":
        return func.attr
    return f"{getattr(owner, '__qualname__', type(owner).__qualname__)}.{func.attr}"


def text_of(call: ast.Call, values: dict[str, Any]) -> str:
    """The call with the shapes or values of its arguments."""
    func = call.func
    said = ast.unparse(func)
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        if type(values.get(func.value.id)).__name__ == "Learner":
            said = func.attr
    parts = [argument(node, values) for node in call.args]
    for keyword in call.keywords:
        given = keyword.value
        if keyword.arg is not None:
            parts.append(f"{keyword.arg}={argument(given, values, named=True)}")
        elif isinstance(given, ast.Name) and isinstance(values.get(given.id), dict):
            options = values[given.id].items()
            parts += [f"{name}={described(value) or '...'}" for name, value in options]
        else:
            parts.append(f"**{ast.unparse(given)}")
    return f"{said}({', '.join(parts)})"


def argument(node: ast.expr, values: dict[str, Any], *, named: bool = False) -> str:
    """One argument: the shape behind a tensor's name, the value behind a number's."""
    if isinstance(node, ast.Name) and node.id in values:
        value = values[node.id]
        text = described(value)
        if text is not None:
            return node.id + text if text.startswith("[") and hasattr(value, "shape") else text
    text = ast.unparse(node)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def described(value: Any) -> str | None:
    """A plain value, a tensor of a few numbers, or a shape ("[4, 8]"); its dtype if unusual."""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        unusual = "" if dtype in ("float32", "int64", "bool") else f" {dtype}"
        return (few(value) or f"{list(shape)}") + unusual
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= LONGEST else None
    return None


def few(value: Any) -> str | None:
    """`tensor([0.5, 2, 0])`, or None for what is longer than a line's half."""
    if len(value.shape) > 1 or sum(value.shape) > FEW:
        return None
    numbers = value.tolist()
    one = not isinstance(numbers, list)
    texts = [
        f"{x:.6g}" if isinstance(x, float) else str(x) for x in ([numbers] if one else numbers)
    ]
    text = ", ".join(texts)
    text = f"{type(value).__name__.lower()}({text if one else f'[{text}]'})"
    return text if len(text) <= LONGEST else None
