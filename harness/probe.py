"""What a kata's `probes.py` imports: the diagnosis' questions to the learner's code.

A probe calls the learner's code on a small fixed input and returns what came out::

    from harness.probe import probe
    from harness.spec import learner

    losses = learner("training.losses")

    @probe
    def two_rows():
        \"\"\"The loss of a batch of two, and its gradient.\"\"\"
        user = torch.tensor([[0.3, -0.7], [1.1, 0.2]], dtype=torch.float64, requires_grad=True)
        loss = losses.in_batch_softmax_loss(user, item, temperature=0.5)
        loss.backward()
        return {"loss": loss, "gradient": user.grad}

What every right solution gives, however it is written, must be the same; what a known mistake gives
should be given by that mistake alone. See diagnosis.py for what is made of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MOST = 400  # values that a probe may return: fixtures are small
TOLERANCE = 1e-6  # of the largest magnitude of a tensor
ROUNDING = 1e-12  # of the largest magnitude of an answer: below is nothing in float64


@dataclass(frozen=True)
class Probe:
    """A question: a function without arguments, and how exactly its numbers have to agree."""

    name: str
    ask: Callable[[], Any]
    tolerance: float


def probe(function: Callable[[], Any] | None = None, *, tolerance: float = TOLERANCE) -> Any:
    """Mark a function of probes.py as a probe: `@probe`, or `@probe(tolerance=1e-4)`."""

    def mark(function: Callable[[], Any]) -> Callable[[], Any]:
        function.__kata_probe__ = tolerance  # type: ignore[attr-defined]
        return function

    return mark if function is None else mark(function)


def probes_in(module: Any) -> list[Probe]:
    """The probes of a module, in the order in which they are written."""
    marked = [f for f in vars(module).values() if hasattr(f, "__kata_probe__")]
    return [Probe(f.__name__, f, f.__kata_probe__) for f in marked]


# --- from what came out to something that can be stored and compared ------------------------------

Answer = list[list[Any]]  # [[head, values], ...]: what and how shaped, and its numbers or text


def answer(question: Probe, seed: int = 0) -> Answer | None:
    """What a probe gives; `None` where the learner has not written what it needs.

    An exception is an answer too: its type, and its message without addresses.
    """
    import torch

    from harness.message import UnwrittenName, is_stub

    torch.manual_seed(seed)
    try:
        return simplified(question.ask())
    except UnwrittenName:
        return None
    except Exception as error:
        if is_stub(error):
            return None
        said = re.sub(r"0x[0-9a-f]+", "0x", str(error).partition("\n")[0])[:160]
        return [[f"raises {type(error).__name__}", [said]]]


def simplified(value: Any) -> Answer:
    found = [[head, values] for head, values in parts(value, "")]
    size = sum(len(values) for _, values in found)
    if size > MOST:
        raise ValueError(f"a probe returned {size} values; at most {MOST} are kept")
    return found


def parts(value: Any, path: str) -> Iterator[tuple[str, list[Any]]]:
    import numpy as np
    import torch

    if isinstance(value, dict):
        for key, each in value.items():
            yield from parts(each, f"{path}.{key}".strip("."))
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(each, (bool, int, float, str)) for each in value):
            yield f"{path} [{len(value)}]".strip(), [plain(each) for each in value]
        else:
            yield f"{path} [{len(value)}]".strip(), []
            for i, each in enumerate(value):
                yield from parts(each, f"{path}[{i}]")
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.as_tensor(value)
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
        flat = tensor.detach().cpu().flatten()
        head = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}" if tensor.dim() else ""
        numbers = flat.double().tolist() if flat.is_floating_point() else flat.tolist()
        yield f"{path} {head}".strip(), [plain(each) for each in numbers]
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield path, [plain(value)]
    elif isinstance(value, np.generic):
        yield path, [plain(value.item())]
    else:
        yield f"{path} {type(value).__name__}".strip(), []


def plain(value: Any) -> Any:
    """Something that JSON holds exactly: numbers that are not finite become text."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return float(f"{value:.12g}")
    return value


def agree(one: Answer, other: Answer, tolerance: float) -> bool:
    """Whether two answers are the same, numbers within `tolerance` of the largest magnitude.

    The largest of a part; but a part in float64 that is nothing but rounding, beside the others, is
    another one on each processor.
    """
    if len(one) != len(other):
        return False
    largest = max((abs(x) for part in (*one, *other) for x in part[1] if is_number(x)), default=0.0)
    for (head, values), (other_head, others) in zip(one, other, strict=True):
        if head != other_head or len(values) != len(others):
            return False
        numbers = [abs(x) for x in (*values, *others) if is_number(x)]
        rounding = ROUNDING * largest if "float64" in head else 0.0
        atol = max(tolerance * max(numbers, default=0.0), rounding)
        for x, y in zip(values, others, strict=True):
            if is_number(x) and is_number(y):
                if abs(x - y) > atol:
                    return False
            elif type(x) is not type(y) or x != y:
                return False
    return True


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
