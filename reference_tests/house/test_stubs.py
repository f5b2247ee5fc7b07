"""Stubs come from the solution: what is emptied, what stays, what vanishes, what is refused."""

import ast
import textwrap

import pytest

from harness import stubs
from harness.catalog import digest


def stub(source, *names, keep=()):
    return stubs.stub_text(textwrap.dedent(source).lstrip(), names, keep, "07", "models/x.py")


def test_only_listed_bodies_are_emptied():
    text = stub(
        '''
        """Module docstring."""

        from torch import Tensor

        SIZE = 3  # stays


        # above the function
        @decorated(SIZE)
        def f(x: Tensor, *, y: int = 2) -> Tensor:  # beside it
            """What it does.

            More.
            """
            # the answer
            return x + secret(y)


        # at the end
        ''',
        "f",
    )
    assert text == textwrap.dedent(
        '''\
        """Module docstring."""

        from torch import Tensor

        SIZE = 3  # stays


        # above the function
        @decorated(SIZE)
        def f(x: Tensor, *, y: int = 2) -> Tensor:  # beside it
            """What it does.

            More.
            """
            raise NotImplementedError("kata 07: write f in src/recsys/models/x.py")


        # at the end
        '''
    )


def test_methods_by_qualified_name():
    text = stub(
        """
        class A:
            size: int = 3

            def __init__(self): self.x = 1

            @property
            def y(self):
                return self.x

            async def z(self):
                yield 1
        """,
        "A.__init__",
        "A.y",
        "A.z",
    )
    assert text.count("raise NotImplementedError(") == 3
    assert "write A.y in" in text and "@property" in text and "size: int = 3" in text
    assert "self.x" not in text and "yield" not in text


def test_what_nothing_kept_refers_to_vanishes():
    text = stub(
        '''
        """Doc."""

        from __future__ import annotations

        import json
        import math, os
        import torch.nn.functional as F
        from typing import TYPE_CHECKING, Any

        from a import (
            b,
            c,
        )

        if TYPE_CHECKING:
            from d import D

        _EPS = 1e-3
        _SHOWN = 5
        __all__ = ["f"]


        def f(x: Any = _SHOWN, y: c = os.sep) -> Any:
            return _helper(x) + json + F + math + b


        def _helper(x):
            return _other(x)


        def _other(x):
            return _helper(x) if x else _EPS


        class _Gone:
            def g(self):
                return 1


        class Kept:
            _LIMIT = 3

            def h(self):
                return self._private()

            def _private(self):
                return self._LIMIT
        ''',
        "f",
        "Kept.h",
    )
    tree = ast.parse(text)
    assert "import os\n" in text and "import Any\n" in text and "    c,\n" in text
    assert "_SHOWN = 5" in text and '__all__ = ["f"]' in text
    assert "from __future__ import annotations" in text
    gone = "json math F TYPE_CHECKING D b _EPS _helper _other _Gone _LIMIT _private".split()
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {getattr(node, "name", None) for node in ast.walk(tree)}
    assert not names & set(gone), text


def test_what_something_kept_refers_to_stays():
    text = stub(
        """
        import math


        def f(x):
            return _helper(x)


        def shown(x):
            return _helper(x)


        def _helper(x):
            return math.pi * x


        class A:
            def g(self):
                return 1

            def __repr__(self):
                return self._name()

            def _name(self):
                return "A"
        """,
        "f",
        "A.g",
        keep=("shown", "A.__repr__"),
    )
    assert "import math" in text and "return math.pi * x" in text and 'return "A"' in text


def test_a_public_function_must_be_listed_or_kept():
    source = "def f():\n    return 1\n\n\ndef g():\n    return 2\n"
    with pytest.raises(stubs.StubError, match=r"models/x.py:5 g is public .*\[keep\]"):
        stub(source, "f")
    assert "return 2" in stub(source, "f", keep=("g",))
    assert "return 2" not in stub(source, "f", "g")
    method = "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n"
    with pytest.raises(stubs.StubError, match="A.g is public"):
        stub(method, "A.f")
    assert "return 1" in stub(method, keep=("A",))


def test_declarations_without_a_body_need_no_listing():
    text = stub(
        """
        class Config:
            size: int = 3

        class Likes(Protocol):
            def f(self) -> int: ...

            def g(self) -> int:
                '''Doc.'''
        """
    )
    assert "raise" not in text


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(stubs.StubError, match="lists A.missing"):
        stub("class A:\n    def f(self):\n        return 1\n", "A.f", "A.missing")


def test_long_messages_are_wrapped():
    name = "a_function_with_a_name_of_some_length"
    text = stub(f"def {name}():\n    return 1\n", name)
    assert max(map(len, text.splitlines())) <= 100
    message = ast.parse(text).body[0].body[0].exc.args[0].value
    assert message == f"kata 07: write {name} in src/recsys/models/x.py"


# --- the commands ---------------------------------------------------------------------------------


def test_check_says_what_is_not_current(checkout):
    assert checkout.kata("stubs", "--check").code == 0
    solution = checkout.root / "reference_tests/solution/recsys/models/scale.py"
    solution.write_text(solution.read_text().replace("The sum of all values", "The total"))
    run = checkout.kata("stubs", "--check")
    assert run.code == 1 and "models/scale.py" in run.out, run
    assert "The total" not in checkout.scale.read_text(), "--check changes nothing"
    assert checkout.kata("stubs").code == 0
    assert "The total" in checkout.scale.read_text()
    assert checkout.kata("stubs", "--check").code == 0


def test_a_body_that_changes_leaves_the_stub_current(checkout):
    solution = checkout.root / "reference_tests/solution/recsys/models/scale.py"
    solution.write_text(solution.read_text().replace("return x * factor", "return factor * x"))
    assert checkout.kata("stubs", "--check").code == 0


def test_stubs_never_touch_the_learners_work(checkout):
    checkout.solve()
    before = checkout.scale.read_bytes()
    solution = checkout.root / "reference_tests/solution/recsys/models/scale.py"
    solution.write_text(solution.read_text().replace("The sum of all values", "The total"))
    run = checkout.kata("stubs")
    assert run.code == 1 and "models/scale.py" in run.out, run
    assert checkout.scale.read_bytes() == before


def test_reset_brings_the_stub_back_and_keeps_the_work(checkout):
    fresh = checkout.scale.read_bytes()
    for work in ("first = 1\n", "second = 2\n"):
        checkout.scale.write_text(work)
        run = checkout.kata("reset", "1")
        assert run.code == 0 and ".kata/kept/" in run.out, run
        assert checkout.scale.read_bytes() == fresh
    kept = {file.read_text() for file in (checkout.root / ".kata/kept").iterdir()}
    assert kept == {"first = 1\n", "second = 2\n"}
    assert "kept" not in checkout.kata("reset", "01_scale").out, "a stub is not work"
    run = checkout.kata("reset", "99")
    assert run.code == 2 and "there is no kata '99'" in run.err, run


def test_line_ends_do_not_make_an_attempt(checkout):
    text = checkout.scale.read_text()
    assert digest(text) == digest(text.replace("\n", "\r\n")) != digest(text + "x = 1\n")
    checkout.scale.write_bytes(text.replace("\n", "\r\n").encode())
    assert '"not_started", "passed": 0, "total": 4' in checkout.kata("status", "--json").out
