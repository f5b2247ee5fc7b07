"""What a kata's tests import: rungs, the learner's code, and comparisons that say what is wrong.

A test file begins like this::

    from harness.spec import assert_close, learner, rung

    losses = learner("training.losses")       # imported when a test first uses it

    @rung(hint="Which axis do the candidates lie on?")
    def test_one_row():
        \"\"\"The loss of a batch of one is 0.\"\"\"
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.1)
        assert_close(loss, expected)

The first line of a rung's docstring says what must hold, and is shown when it does not.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from harness import overlay, settings
from harness.calls import Call, seen
from harness.message import KataFailure, UnwrittenName, is_absent
from harness.paths import FIXTURES

if TYPE_CHECKING:  # torch costs two seconds: a test that needs it imports it
    import torch
    from torch import Tensor

    from harness.cost import Cost
    from harness.devices import DeviceRun

Test = TypeVar("Test", bound=Callable[..., object])

SHOWN = 6  # values of a tensor in a message
TOLERANCES = {  # dtype of the result -> (rtol, atol), unless a test says otherwise
    "float64": (1e-9, 1e-10),
    "float32": (1e-5, 1e-6),
    "bfloat16": (1.6e-2, 1e-3),
    "float16": (2e-3, 1e-4),
}


# --- a test and what it runs on -------------------------------------------------------------------


def rung(
    *, hint: str = "", hints: Sequence[str] = (), seconds: float | None = None
) -> Callable[[Test], Test]:
    """Mark a test function as a rung; `hints` go from a nudge to nearly the answer.

    Hints are read from the text of the spec (harness/catalog.py), where nothing is imported.

    Args:
        seconds: that it may take, where the usual two minutes are too short.
    """

    def mark(test: Test) -> Test:
        test.__kata_seconds__ = seconds  # type: ignore[attr-defined]
        return test

    return mark


def given(
    strategies: Callable[[Any], dict[str, Any]], *, examples: int = 20
) -> Callable[[Test], Callable[[], None]]:
    """Let hypothesis choose a test's arguments, the same ones in every run::

        @rung(hint="The mean moves with the rows.")
        @given(lambda st: {"rows": st.integers(1, 7), "shift": st.floats(-500, 500)})
        def test_a_shift_changes_nothing(rows, shift):

    Args:
        strategies: from `hypothesis.strategies` to a strategy for each argument. It is called when
            the test runs: importing hypothesis takes longer than most katas do.
        examples: at most so many are tried.
    """

    def mark(test: Test) -> Callable[[], None]:
        def run() -> None:
            import hypothesis

            quick = hypothesis.settings(
                derandomize=True, database=None, deadline=None, max_examples=examples
            )
            tried = hypothesis.given(**strategies(hypothesis.strategies))(at_once(test))
            try:
                quick(tried)()
            except Absent as absent:
                raise absent.args[0] from None

        run.__name__, run.__qualname__ = test.__name__, test.__qualname__
        run.__module__, run.__doc__ = test.__module__, test.__doc__
        return run

    return mark


class Absent(BaseException):
    """Code that is not there; hypothesis lets it through instead of trying other examples."""


def at_once(test: Test) -> Callable[..., None]:
    """The test, whose first meeting with code that is not there ends the search."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        try:
            test(*arguments, **named)
        except Exception as error:
            if is_absent(error):
                raise Absent(error) from None
            raise

    return run


class Learner:
    """A module of the learner, imported anew from the --impl roots when an attribute is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle, inspect: nobody's learner code
            raise AttributeError(name)
        if settings.collecting:
            raise RuntimeError(
                f"{self._name}.{name} is used while the tests are collected; use it inside a test, "
                "so that a syntax error in the learner's file costs no test ids"
            )
        full = f"recsys.{self._name}"
        module = importlib.import_module(full)
        overlay.check_origin(module)
        try:
            return getattr(module, name)
        except AttributeError:
            file = f"{self._name.replace('.', '/')}.py"
            raise UnwrittenName(name, f"src/recsys/{file}") from None

    def __repr__(self) -> str:
        return f"learner({self._name!r})"


def learner(name: str) -> Learner:
    """The learner's module `recsys.<name>`, for example learner("training.losses")."""
    return Learner(name)


def beside(file: str, name: str) -> ModuleType:
    """The module `name` in the folder of a kata's `file`: what its spec and its probes share.

    A folder whose name begins with a digit has no name for an import statement.
    """
    return importlib.import_module(f"katas.{Path(file).parent.name}.{name}")


def after_the_others() -> None:
    """Red while another rung of the kata is: what takes long waits until the rest is right."""
    if settings.red is not None and is_absent(settings.red):
        raise settings.red
    if settings.red is not None:
        fail(expected="every rung before it green: mend those first, this one takes minutes")


def device() -> torch.device:
    """The device that --device names: make every input on it."""
    import torch

    return torch.device(settings.device())


def generator(seed: int) -> torch.Generator:
    """A seeded generator on the CPU: draw there and move, so that all devices see the same."""
    import torch

    return torch.Generator().manual_seed(seed)


def fixture(name: str) -> Path:
    """The file fixtures/NN_name/<name> of the kata whose test calls this."""
    here = Path(sys._getframe(1).f_globals["__file__"]).resolve().parent.name
    return FIXTURES / here / name


def golden(name: str) -> Any:
    """What the JSON file fixtures/NN_name/<name> holds, for the kata whose test calls this."""
    here = Path(sys._getframe(1).f_globals["__file__"]).resolve().parent.name
    return json.loads((FIXTURES / here / name).read_text(encoding="utf-8"))


# --- comparisons ----------------------------------------------------------------------------------


def assert_close(
    actual: Any,
    expected: Any,
    *,
    call: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    dtype: torch.dtype | None = None,
    like: Tensor | None = None,
    what: str = "",
) -> None:
    """`actual` is a tensor of the type, shape and values of `expected`; nothing is broadcast.

    Args:
        expected: a tensor, an array or nested lists. Of a tensor the dtype must agree too, unless
            `dtype` or `like` says another (a float64 oracle of a float32 result).
        call: what was called; by default it is read from the test's source.
        rtol, atol: `|actual - expected| <= atol + rtol * |expected|`; default by the dtype of
            `actual`. Integers and booleans have to be equal.
        like: a tensor whose dtype and device the result must have.
        what: which part of the result this is, for example "gradient of user".
    """
    import torch

    called = call_of(call)
    if like is not None:
        dtype = like.dtype
    elif dtype is None and is_tensor(expected):
        dtype = expected.dtype
    wanted = expected if is_tensor(expected) else torch.as_tensor(expected)
    wanted = wanted.detach().cpu()

    def wrong(came_back: str, should: str, *more: tuple[str, str]) -> NoReturn:
        fail(came_back=came_back, expected=should, call=called, what=what, more=more)

    if not is_tensor(actual):
        wrong(plain(actual), f"a tensor of shape {list(wanted.shape)}")
    if actual.shape != wanted.shape:
        wrong(shape_text(actual), f"shape {list(wanted.shape)}", ("values", values_text(actual)))
    if dtype is not None and actual.dtype != dtype:
        wrong(f"dtype {short(actual.dtype)}", f"dtype {short(dtype)}")
    if like is not None and actual.device != like.device:
        wrong(f"a tensor on {actual.device}", f"on {like.device}, where the inputs are")
    compare(actual, wanted, rtol, atol, wrong)


def assert_scalar(
    actual: Any,
    expected: float,
    *,
    call: str | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    what: str = "",
) -> None:
    """`actual` is the number `expected`: a float or a 0-dim tensor, either will do."""
    import torch

    called = call_of(call)
    expected = float(expected)

    def wrong(came_back: str, should: str, *more: tuple[str, str]) -> NoReturn:
        fail(came_back=came_back, expected=should, call=called, what=what, more=more)

    if isinstance(actual, bool) or not (
        isinstance(actual, (int, float)) or getattr(actual, "shape", None) == ()
    ):
        wrong(plain(actual), f"a float or a 0-dim tensor: {number(expected)}")
    if not is_tensor(actual):
        actual = torch.tensor(float(actual), dtype=torch.float64)
        rtol, atol = (1e-6 if rtol is None else rtol), (1e-7 if atol is None else atol)
    elif actual.dtype == torch.bool or actual.is_complex():
        wrong(plain(actual), f"a number: {number(expected)}")
    elif not actual.is_floating_point():
        actual = actual.double()
    compare(actual, torch.tensor(expected, dtype=torch.float64), rtol, atol, wrong)


def assert_equal(actual: Any, expected: Any, *, call: str | None = None, what: str = "") -> None:
    """`actual` is the plain value `expected` (a list, a string, a number), of the same type."""
    if type(actual) is not type(expected) or actual != expected:
        fail(came_back=plain(actual), expected=plain(expected), call=call_of(call), what=what)


def check(
    condition: Any,
    expected: str,
    *,
    came_back: Any = None,
    call: str | None = None,
    what: str = "",
) -> None:
    """`condition` holds; otherwise the rung is red with the sentence `expected`."""
    if not bool(condition):
        text = None if came_back is None else plain(came_back)
        fail(came_back=text, expected=expected, call=call_of(call), what=what)


def expect_error(
    function: Callable[[], Any],
    errors: type[BaseException] | tuple[type[BaseException], ...],
    *,
    about: str | Sequence[str] = (),
    call: str | None = None,
) -> None:
    """`function()` raises one of `errors`, with a message that mentions `about`.

    Args:
        about: a word, or several of which one is enough; upper and lower case are the same.
    """
    called = call_of(call)
    kinds = errors if isinstance(errors, tuple) else (errors,)
    words = (about,) if isinstance(about, str) else tuple(about)
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if words:
        wanted += f" with a message about {' or '.join(words)}"
    try:
        result = function()
    except Exception as error:
        if is_absent(error):
            raise  # code that is not there refuses nothing
        text = str(error)
        if isinstance(error, kinds) and (
            not words or any(word.lower() in text.lower() for word in words)
        ):
            return
        came_back = f"{type(error).__name__}: {text}" if text else type(error).__name__
        fail(came_back=came_back, expected=wanted, call=called, cause=error)
    fail(came_back=f"no error, but {plain(result)}", expected=wanted, call=called)


def fail(
    *,
    expected: str,
    came_back: str | None = None,
    call: str | Pending | None = None,
    what: str = "",
    more: Sequence[tuple[str, str]] = (),
    cause: BaseException | None = None,
) -> NoReturn:
    """Make the rung red with this message; of a `cause` the learner's line is shown."""
    called = (call if isinstance(call, Pending) else call_of(call)).seen()
    facts = [("called", called and called.text), ("looked at", what), ("came back", came_back)]
    facts += [("expected", expected), *more]
    told = [(label, text) for label, text in facts if text]
    raise KataFailure(told, called.name if called else None) from cause


# --- cost and devices -----------------------------------------------------------------------------


def count(function: Callable[[], Any]) -> Cost:
    """Run `function()` once and count operations, memory and synchronisations: harness.cost.

    Example:
        cost = count(lambda: table.bag(values, offsets))
        check(cost.largest_bytes <= 4 * batch * width, "...", came_back=cost.largest_bytes)
    """
    from harness import cost

    return cost.count(function)


def assert_scales(
    function_of_size: Callable[[int], Any],
    sizes: tuple[int, int] = (8, 64),
    *,
    allowance: int | None = None,
    call: str | None = None,
    what: str = "",
) -> None:
    """As many operations for a large input as for a small one: no Python loop over rows.

    Args:
        function_of_size: prepares an input of a size and returns the function to be counted, or
            does both, where the preparation itself does not grow.
        allowance: how many operations (views included) the large one may have more, for chunks or
            a logarithm; by default half of what a loop with one operation a row would add.

    Example:
        def bags(size):
            values, offsets = torch.arange(size), torch.arange(0, size, 2)
            return lambda: table.bag(values, offsets)

        assert_scales(bags)
    """
    called = call_of(call)
    small, large = sizes
    few, many = (prepared_count(function_of_size, size) for size in sizes)
    grown = many.operations + many.views - few.operations - few.views
    allowance = (large - small) // 2 if allowance is None else allowance
    if grown <= allowance:
        return
    came_back = f"{many.operations + many.views} operations at size {large}, "
    came_back += f"{few.operations + few.views} at size {small}"
    expected = "operations on whole tensors, about as many at any size"
    expected += f" (at most {allowance} more)" if allowance else ""
    more = many.by_place
    more.subtract(few.by_place)
    place = max(more, key=lambda each: (each is not None, more[each]), default=None)
    fail(
        came_back=came_back,
        expected=expected,
        call=called,
        what=what,
        more=place.facts("most in") if place else (),
    )


def assert_budget(
    function: Callable[[], Any],
    *,
    largest: int | None = None,
    allocated: int | None = None,
    operations: int | None = None,
    why: str = "",
    call: str | None = None,
    what: str = "",
) -> Cost:
    """`function()` makes no tensor of more than `largest` bytes, nor `allocated` bytes in all.

    Args:
        operations: at most as many, views apart; leave room for other ways to write it.
        why: what the budget is, for the message: "B * D floats, the result".

    Example:
        assert_budget(lambda: table.bag(values, offsets), largest=4 * 2 * B * D, why="2 * B * D")
    """
    called = call_of(call)
    cost = count(function)
    reason = f": {why}" if why else ""
    if largest is not None and cost.largest is not None and cost.largest.bytes > largest:
        made = cost.largest
        fail(
            came_back=f"a tensor of {made.bytes:,} bytes: {made.operation} makes {made.shape}, "
            f"{made.dtype}",
            expected=f"at most {largest:,} bytes for any one tensor{reason}",
            call=called,
            what=what,
            more=made.place.facts() if made.place else (),
        )
    for found, most, unit in (
        (cost.allocated_bytes, allocated, "bytes for all tensors that are made"),
        (cost.operations, operations, "operations"),
    ):
        if most is not None and found > most:
            expected = f"at most {most:,} {unit}{reason}"
            fail(came_back=f"{found:,}", expected=expected, call=called, what=what)
    return cost


def assert_no_sync(
    scenario: Callable[[torch.device], Any],
    *,
    ignore: Sequence[str] = (),
    call: str | None = None,
    what: str = "",
) -> DeviceRun:
    """Nothing in it makes the host wait for the device: no item(), tolist(), cpu(), `if tensor`.

    The scenario runs on the CPU first, where its errors are errors as ever, and then where tensors
    say that they are on a GPU; synchronisations are counted there. Checks that are made for CPU
    tensors only do not count, nor does what torch's optimizers read from CPU counters.

    Args:
        scenario: makes its modules and inputs on the device that it is given and returns the
            function to be counted: the preparation is not. (Where it returns none, all counts.)
        ignore: names of synchronisations that are allowed, as in `Cost.syncs`.

    Example:
        def step(device):
            model, batch = make(device)
            return lambda: loop.train_step(model, batch)

        assert_no_sync(step)
    """
    called = call_of(call)
    run = on_another_device(scenario)
    cost = run.cost
    waits = [i for i, name in enumerate(cost.syncs) if name not in ignore]
    if waits:
        names = dict.fromkeys(cost.syncs[i] for i in waits)
        place = next((cost.sync_places[i] for i in waits if cost.sync_places[i]), None)
        times = "once" if len(waits) == 1 else f"{len(waits)} times"
        fail(
            came_back=f"it waits for the device {times}: {', '.join(names)}",
            expected="no synchronisation: tensors stay on the device",
            call=called,
            what=what,
            more=place.facts() if place else (),
        )
    return run


def assert_device_safe(
    scenario: Callable[[torch.device], Any], *, call: str | None = None, what: str = ""
) -> DeviceRun:
    """It works on another device: nothing that is made on the CPU is mixed in or comes back.

    Runs on the CPU first, where errors are errors as ever. Then only a device bug makes it red; an
    operation that the simulated device does not know, for one, does not (harness.devices).

    Args:
        scenario: makes its modules and inputs on the device that it is given, and returns what has
            to be there in the end: tensors, modules, lists or dicts of them.

    Example:
        def lookup(device):
            table = embedding.EmbeddingTable(5, 3).to(device)
            return table(torch.tensor([1, 2], device=device))

        assert_device_safe(lookup)
    """
    called = call_of(call)
    run = on_another_device(scenario)
    for finding in run.findings:
        more = finding.place.facts() if finding.place else []
        more += finding.made.facts("made in") if finding.made else []
        fail(
            came_back=finding.text,
            expected="every tensor that is made is made on the device of the inputs",
            call=called,
            what=what,
            more=more,
        )
    return run


# --- how ------------------------------------------------------------------------------------------


def prepared_count(function_of_size: Callable[[int], Any], size: int) -> Cost:
    """What the function that comes back costs, or else the call itself; warmed up in any case."""
    found = function_of_size(size)
    if isinstance(found, FunctionType):
        found()
        return count(found)
    return count(lambda: function_of_size(size))


def on_another_device(scenario: Callable[[torch.device], Any]) -> DeviceRun:
    import torch

    from harness.devices import other_device_findings

    found = scenario(torch.device("cpu"))
    if isinstance(found, FunctionType):
        found()
    return other_device_findings(scenario)


def compare(
    actual: Tensor,
    wanted: Tensor,
    rtol: float | None,
    atol: float | None,
    wrong: Callable[..., NoReturn],
) -> None:
    """Values only: the shapes agree. Calls `wrong` with what differs, and where first."""
    import torch

    if wanted.numel() == 0:
        return
    mine = actual.detach().cpu()
    exact = not (mine.is_floating_point() or mine.is_complex())
    usual = TOLERANCES.get(short(mine.dtype), (0.0, 0.0))
    rtol = usual[0] if rtol is None else rtol
    atol = usual[1] if atol is None else atol
    if exact:
        bad = mine.to(wanted.dtype) != wanted if mine.dtype != wanted.dtype else mine != wanted
        units = bad.double()
    else:
        mine, wanted = mine.double(), wanted.double()
        same = (mine == wanted) | (mine.isnan() & wanted.isnan())  # infinities too
        off = (mine - wanted).abs() / (atol + rtol * wanted.abs()).clamp_min(5e-324)
        units = torch.where(same, 0.0, off.nan_to_num(nan=math.inf, posinf=math.inf))
        bad = units > 1
    if not bool(bad.any()):
        return
    first = tuple(bad.nonzero()[0].tolist())
    worst = tuple(torch.where(bad, units, -1.0).flatten().argmax().unsqueeze(0).tolist())
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst[0]), bad.shape))
    more = []
    if bad.dim():
        count = f"{int(bad.sum())} of {bad.numel()} values differ"
        one, other = apart(mine[first], wanted[first])
        at = f"{list(first)}: {one} instead of {other}; {count}"
        more.append(("first at", at))
    if not exact:
        gap = abs(float(mine[worst]) - float(wanted[worst]))
        text = f"by {number(gap)}, {times(float(units[worst]))} the tolerance"
        text += f" (rtol {rtol:g}, atol {atol:g})"
        if bad.dim() and worst != first:
            text += f", worst at {list(worst)}"
        if not math.isnan(gap):
            more.append(("differs", text))
    start = place_of(first, bad.shape) if bad.dim() else 0
    wrong(values_text(actual, start), values_text(wanted, start), *more)


def call_of(call: str | None) -> Pending:
    """Where a comparison was called, for `fail` to say what was called there."""
    return Pending(call, sys._getframe(2))


class Pending:
    """A call that is put into words only when a rung is red: that takes a millisecond."""

    def __init__(self, said: str | None, frame: FrameType | None) -> None:
        self.said, self.frame = said, frame

    def seen(self) -> Call | None:
        """What the test that called a comparison last called; what it says itself goes first."""
        frame, found = self.frame, None
        test_file = frame.f_code.co_filename if frame else ""
        while found is None and frame is not None and frame.f_code.co_filename == test_file:
            found = seen(frame)  # a helper of the test may do the comparison
            frame = frame.f_back
        if self.said is not None:
            named = re.match(r"\w+(?=\()", self.said)
            return Call(self.said, named[0] if named else found.name if found else "")
        return found


def number(value: Any) -> str:
    value = value.item() if is_tensor(value) else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def apart(one: Any, other: Any) -> tuple[str, str]:
    """Two numbers, with so many digits that they can be told apart."""
    texts = number(one), number(other)
    for digits in range(7, 18):
        if texts[0] != texts[1] or not getattr(one, "is_floating_point", bool)():
            break
        texts = f"{one.item():.{digits}g}", f"{other.item():.{digits}g}"
    return texts


def times(units: float) -> str:
    if math.isinf(units):
        return "infinitely many times"
    return f"{units:.2g} times" if units >= 1e4 else f"{units:.0f} times" if units >= 10 else (
        f"{units:.1f} times"
    )


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # not there: nobody made a tensor
    return torch is not None and isinstance(value, torch.Tensor)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(value: Tensor) -> str:
    return f"shape {list(value.shape)}"


def place_of(index: tuple[int, ...], shape: Sequence[int]) -> int:
    """Where to begin so that the value at `index` is seen: its row if that is short."""
    flat = 0
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    row = flat - index[-1]
    return 0 if flat < SHOWN else row if index[-1] < SHOWN else flat


def values_text(value: Tensor, start: int = 0) -> str:
    """A few values, from the flat place `start` on."""
    flat = value.detach().flatten()[start : start + SHOWN].cpu()
    shown = ", ".join(number(each) for each in flat)
    if value.dim() == 0:
        return shown
    before, after = "..., " * (start > 0), ", ..." * (start + SHOWN < value.numel())
    return f"[{before}{shown}{after}] of shape {list(value.shape)}"


def plain(value: Any) -> str:
    """A value of any type in a few words."""
    if is_tensor(value):
        return f"{values_text(value)}, {short(value.dtype)}"
    if value is None:
        return "None (is there a `return`?)"
    if isinstance(value, (bool, int, float, str, list, tuple, dict)):
        text = repr(value)
        return (text if len(text) <= 120 else text[:117] + "...") + f" ({type(value).__name__})"
    shape = getattr(value, "shape", None)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"a {kind}" + (f" of shape {list(shape)}" if shape is not None else "")
