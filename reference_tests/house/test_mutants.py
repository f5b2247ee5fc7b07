"""Mutants: each operator makes what it should, only in the learner's code, with stable ids."""

import ast
import textwrap
from collections import Counter

import pytest

from harness import catalog, stubs
from harness.paths import REFERENCE
from reference_tests.strength.mutants import Mutant, mutants_of, select


def mutants(source, stub=""):
    return mutants_of("models/x.py", textwrap.dedent(source), textwrap.dedent(stub))


def edits(*lines, head="def f(x, y):"):
    """The edits of a function that the stub lacks, as operator and what follows it in the id."""
    body = textwrap.indent("\n".join(lines), "    ")
    source = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n\n"
    found = mutants(f"{source}{head}\n{body}\n", source + "...\n")
    return {mutant.id.split(": ", 1)[1] for mutant in found}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x < y", {"comparison: `x < y` -> `x <= y`"}),
        ("x >= y", {"comparison: `x >= y` -> `x > y`"}),
        ("x == y", {"comparison: `x == y` -> `x != y`"}),
        ("x is None", {"comparison: `x is None` -> `x is not None`"}),
        ("x is not None", {"comparison: `x is not None` -> `x is None`"}),
        ("x in y", {"comparison: `x in y` -> `x not in y`"}),
        (
            "x < y <= z",
            {
                "comparison: `x < y <= z` -> `x <= y <= z`",
                "comparison: `x < y <= z` -> `x < y < z`",
            },
        ),
        ("x + y", {"arithmetic: `x + y` -> `x - y`"}),
        ("x * y", {"arithmetic: `x * y` -> `x / y`"}),
        ("x // y", {"arithmetic: `x // y` -> `x % y`"}),
        ("1 / z ** y", {"arithmetic: `z ** y` -> `(z * y)`", "arithmetic", "constant"}),
        ("-x", {"arithmetic: `return -x` -> `return x`"}),
        ("x @ y", set()),
        ("x + [y]", set()),  # a list less a list could only crash
        ("x and y", {"boolean: `x and y` -> `x or y`"}),
        ("x & ~y", {"boolean: `x & ~y` -> `x | ~y`", "boolean: `x & ~y` -> `x & y`"}),
        ("g[not (x and y)]", {"boolean: `g[not (x and y)]` -> `g[(x and y)]`", "boolean"}),
        ("x[3]", {"constant: `x[3]` -> `x[4]`"}),
        ("[0.0]", {"constant: `[0.0]` -> `[1.0]`"}),
        ("[1.0]", {"constant: `[1.0]` -> `[0.0]`"}),
        ("[0.07]", {"constant: `[0.07]` -> `[1.07]`"}),
        ("[1e-12]", {"constant: `[1e-12]` -> `[1e-2]`"}),
        ("[True]", {"constant: `[True]` -> `[False]`"}),
        ("['mean', None]", set()),
        ("x.shape[1]", {"axis: `x.shape[1]` -> `x.shape[0]`"}),
        ("x.sum(1)", {"axis: `x.sum(1)` -> `x.sum(0)`", "call: `x.sum(1)` -> `x`"}),
        ("x.mean((0, 1))", {"axis: `x.mean((0, 1))` -> `x.mean((0,))`", "call"}),
        ("torch.sum(x, -1)", {"axis: `torch.sum(x, -1)` -> `torch.sum(x, 0)`", "call"}),
        ("max(x, 1)", {"constant: `max(x, 1)` -> `max(x, 2)`", "call: `max(x, 1)` -> `x`"}),
        (
            "F.normalize(x, dim=-1)",
            {
                "axis: `F.normalize(x, dim=-1)` -> `F.normalize(x, dim=0)`",
                "keyword: `F.normalize(..., dim=-1)` -> `F.normalize(...)`",
                "call: `F.normalize(x, dim=-1)` -> `x`",
            },
        ),
        ("g(x, k=y)", {"keyword: `g(..., k=y)` -> `g(...)`", "call"}),
        ("g(k=y)", {"keyword: `g(k=y)` -> `g()`"}),
        ("g(k=y, j=x)", {"keyword: `g(..., k=y)` -> `g(...)`", "keyword"}),
        ("x.detach()", {"call: `x.detach()` -> `x`"}),
        ("(x + y).detach()", {"call: `(x + y).detach()` -> `(x + y)`", "arithmetic"}),
        ("self.mlp(x)", {"call: `self.mlp(x)` -> `x`"}),
        ("Thing.fit(x)", {"call: `Thing.fit(x)` -> `x`"}),
        ("nn.Parameter(x)", {"call: `nn.Parameter(x)` -> `x`"}),
        ("float('-inf')", set()),
        ('float("-inf")', {'arithmetic: `float("-inf")` -> `float("inf")`'}),
        ("x.reshape(-1)", {"call: `x.reshape(-1)` -> `x`"}),
        ("x[1:]", {"slice: `x[1:]` -> `x[:]`", "constant: `x[1:]` -> `x[2:]`"}),
        ("x[:, y:z]", {"slice: `x[:, y:z]` -> `x[:, :z]`", "slice: `x[:, y:z]` -> `x[:, y:]`"}),
    ],
)
def test_an_expression(line, expected):
    """A bare operator among the expected stands for more of its kind, not looked at here."""
    found = edits(f"return {line}")
    named = {edit for edit in expected if ":" in edit}
    assert named <= found
    others = {edit.partition(":")[0] for edit in found - named}
    assert others == expected - named


@pytest.mark.parametrize(
    "line",
    [
        "return torch.ones(y, device=x.device)",  # a CPU has one device
        "return x.cpu()",
        "return x.to(x.device)",
        "return zip(x, y, strict=True)",
        "return torch.zeros(y)",
        "return bool(x)",
        "return Thing(x)",
        "return x.size()",
        "return f'{x + 1} of {len(y) - 1}'",
        "raise ValueError(f'{x + 1}', x < y, g(x, k=2))",
        "logger.warning('%s', x + 1)",
        "logging.info(x + 1)",
        "z: Literal[1] = x",
        "import math",
        "from math import pi as tau",
        "def g(z: Literal[2]) -> Literal[3]: return z",
        '"""Docstring with 1 + 1 and x < y."""',
        "...",
        "return x",
        "z = y",  # has no value before: without it the rest could only crash
        "a, b = g(x)",
    ],
)
def test_nothing_is_changed_in(line):
    assert edits(line) == set()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["g()"], {"`g()` -> `pass`"}),
        (["x.clamp_(y)"], {"`x.clamp_(y)` -> `pass`"}),
        (["x = y"], {"`x = y` -> `pass`"}),
        (["z = y", "z = x"], {"`z = x` -> `pass`"}),
        (["for z in x:", "    z = y"], {"`z = y` -> `pass`"}),
        (["with g as z:", "    z = y"], {"`z = y` -> `pass`"}),
        (["x, y = y, x"], {"`x, y = y, x` -> `pass`"}),
        (["x, z = y, x"], set()),
        (["z[y] = x"], {"`z[y] = x` -> `pass`"}),
        (["z.weight = x"], {"`z.weight = x` -> `pass`"}),
        (["z += x"], {"`z += x` -> `pass`"}),
        (["if x is None: raise ValueError('x')"], {"`if x is None: raise` -> `pass`"}),
        (["if x:", "    z = y", "    return z"], {"`if x: return` -> `pass`"}),
        (["if x:", "    return y", "else:", "    return x"], set()),
        (["if x:", "    g()", "elif y:", "    return x"], {"`g()` -> `pass`"}),
        (["with torch.no_grad():", "    return x"], {"`with torch.no_grad()` -> `if True`"}),
        (["with open(x) as z:", "    return z"], set()),
    ],
)
def test_a_statement(lines, expected):
    found = {edit for edit in edits(*lines) if edit.startswith("statement: ")}
    assert found == {f"statement: {edit}" for edit in expected}


def test_the_first_value_of_an_attribute_stays():
    found = edits("self.a = x", "self.a = y", head="def __init__(self, x, y):")
    assert found == {"statement: `self.a = y` -> `pass`"}
    assert len(edits("self.a = x", head="def g(self, x):")) == 1


def test_an_inner_function_has_names_of_its_own():
    inner = ["z = x", "def g():", "    nonlocal z", "    z = y", "return g"]
    assert edits(*inner) == {"statement: `z = y` -> `pass`"}
    assert edits(*inner[:2], *inner[3:]) == set()


def test_break_and_continue():
    found = edits("for z in x:", "    break")
    assert found == {"break: `break` -> `continue`"}
    found = edits("while x:", "    continue")
    assert found == {"break: `continue` -> `break`"}


def test_the_branch_of_a_gpu_is_left_alone():
    found = edits('if x == "cuda":', "    y.g(x + 1)", "else:", "    y.h()")
    assert found == {
        'comparison: `x == "cuda"` -> `x != "cuda"`',
        "statement: `y.h()` -> `pass`",
    }


def test_of_an_error_its_number_counts():
    found = edits("raise HTTPException(413, f'{x + 1} bytes', 'more than 1')")
    assert {edit.partition(":")[0] for edit in found} == {"constant"}
    assert len(found) == 1


def test_a_keyword_that_a_function_here_needs_is_kept():
    source = """
        def f(x):
            return g(x, needed=x, free=x)

        def g(x, *, needed, free=1):
            return x
        """
    said = [mutant.id for mutant in mutants(source) if mutant.operator == "keyword"]
    assert said == ["f: keyword: `g(..., free=x)` -> `g(...)`"]


REFERENCE_TEXT = '''
"""Module, 1 + 1."""

import torch

LIMIT = 5
_SECRET = 7


@torch.no_grad()
def listed(x: int = 3) -> int:
    """Doc 4."""
    return x + _SECRET


def shown(x):
    return x - 2


class Given:
    size: int = 8

    def kept(self):
        return self.size < 9

    def written(self):
        return self.size > 9

    def _helper(self, x=6):
        return x


class _Own:
    width = 10


@torch.no_grad()
def _inner(x):
    return [z * 2 for z in x]
'''
STUB_TEXT = '''
"""Module, 1 + 1."""

import torch

LIMIT = 5


@torch.no_grad()
def listed(x: int = 3) -> int:
    """Doc 4."""
    raise NotImplementedError("write listed")


def shown(x):
    return x - 2


class Given:
    size: int = 8

    def kept(self):
        return self.size < 9

    def written(self):
        raise NotImplementedError("write written")
'''


def test_only_what_the_learner_writes_is_changed():
    assert [(m.name, m.id.split(": ", 1)[1]) for m in mutants(REFERENCE_TEXT, STUB_TEXT)] == [
        ("_SECRET", "constant: `_SECRET = 7` -> `_SECRET = 8`"),
        ("listed", "arithmetic: `x + _SECRET` -> `x - _SECRET`"),
        ("Given.written", "comparison: `self.size > 9` -> `self.size >= 9`"),
        ("Given.written", "constant: `self.size > 9` -> `self.size > 10`"),
        ("Given._helper", "constant: `6` -> `7`"),
        ("_Own.width", "constant: `width = 10` -> `width = 11`"),
        ("_inner", "statement: `@torch.no_grad()` -> ``"),
        ("_inner", "arithmetic: `z * 2` -> `z / 2`"),
        ("_inner", "constant: `z * 2` -> `z * 3`"),
    ]


def test_a_mutant_is_the_file_with_one_edit():
    (mutant,) = mutants("def f(x):\n    # why\n    return x.mean(  )  # so\n")
    assert mutant == Mutant(
        "f: call: `x.mean(  )` -> `x`", "models/x.py", "f", "call", 3,
        "\ndef f(x):\n    # why\n    return x  # so\n".lstrip("\n"),
    )  # fmt: skip


def test_the_layout_of_the_text_is_not_in_the_id():
    flat = "def f(x):\n    return g(x, [1], k=x + x)\n"
    laid = "def f(x):\n    return g(\n        x,  # why\n        [1],\n        k=x + x,\n    )\n"
    assert [mutant.id for mutant in mutants(flat)] == [mutant.id for mutant in mutants(laid)]
    for mutant in mutants(laid):
        ast.parse(mutant.text)


def test_an_edit_keeps_what_belongs_together():
    """Parentheses are added where the text would else be read in another way."""
    texts = {mutant.text for mutant in mutants("def f(x):\n    return 8 / x**3 - g(x + 1) * x\n")}
    assert "def f(x):\n    return 8 / (x*3) - g(x + 1) * x\n" in texts
    assert "def f(x):\n    return 8 / x**3 - (x + 1) * x\n" in texts


def test_a_dropped_argument_takes_one_comma_with_it():
    texts = {mutant.text for mutant in mutants("def f(x):\n    h(k=x, j=x)\n    h(x, k=x,)\n")}
    for first in ("h(j=x)", "h(k=x)"):
        assert f"def f(x):\n    {first}\n    h(x, k=x,)\n" in texts
    assert "def f(x):\n    h(k=x, j=x)\n    h(x,)\n" in texts


def test_no_mutant_twice_and_none_that_is_the_same_program():
    assert edits("return g(g(x))") == {"call: `g(g(x))` -> `g(x)`"}
    assert edits("return [1e300]") == set()  # and 1 is the same
    assert [mutant.id for mutant in mutants("def f(x):\n    return [g(x), g(x)]\n")] == [
        "f: call: `g(x)` -> `x`",
        "f: call: `g(x)` -> `x` #2",
    ]


FOUR = "\n\n".join(
    f"def {name}(x, y):\n    if x < y:\n        return -x\n    x.g()\n    return x[{n}:] + {n} * y"
    for n, name in enumerate(["first", "second", "third", "fourth"], start=2)
)


def test_an_edit_elsewhere_changes_no_id():
    before = {mutant.id: mutant for mutant in mutants(FOUR)}
    changed = FOUR.replace("def third(x, y):\n", "def third(x, y):\n    y = x < 9\n", 1)
    after = {mutant.id: mutant for mutant in mutants(f"import os\n\n{changed}")}
    assert set(before) < set(after)
    assert {after[id].name for id in set(after) - set(before)} == {"third"}
    assert all(after[id].line >= before[id].line + 2 for id in before)


def test_the_selection_is_the_same_each_time_and_spread():
    found = mutants(FOUR)
    some = select(found, 16)
    assert some == select(list(reversed(found)), 16)[::-1] == select(select(found, 20), 16)
    assert Counter(mutant.name for mutant in some) == {
        "first": 4, "second": 4, "third": 4, "fourth": 4
    }  # fmt: skip
    for name in ("first", "second", "third", "fourth"):
        assert len({mutant.operator for mutant in some if mutant.name == name}) == 4
    assert some == [mutant for mutant in found if mutant in some]
    assert select(found, 10_000) == found and select(found, 0) == []


def test_an_edit_elsewhere_hardly_changes_the_selection():
    before = select(mutants(FOUR), 16)
    changed = FOUR.replace("def third(x, y):\n", "def third(x, y):\n    y = x < 9\n", 1)
    after = select(mutants(changed), 16)
    gone = {mutant.id for mutant in before} ^ {mutant.id for mutant in after}
    assert {id.partition(":")[0] for id in gone} <= {"third"}


@pytest.mark.parametrize("kata", catalog.load(), ids=lambda kata: kata.id)
def test_every_kata_has_enough(kata):
    found = []
    for file in kata.files:
        source = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
        made = mutants_of(file, source, stubs.generate(kata, file))
        assert len({mutant.text for mutant in made}) == len(made)
        for mutant in select(made, 5):  # all have been compiled, but only the part that changed
            compile(mutant.text, mutant.file, "exec")
        print(f"{file}: {len(made)} mutants")
        found += made
    assert len({mutant.id for mutant in found}) == len(found) >= 40
    assert len({mutant.operator for mutant in found}) >= 7
