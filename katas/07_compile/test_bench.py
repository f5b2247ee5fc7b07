"""Kata 07: what compiling takes and gives, eager beside compiled in one run.

    pytest katas/07_compile -m benchmark
    pytest katas/07_compile -m benchmark --device cuda

A cross network, a tower and a training step of a two-tower model. On a CPU times are reported and
never judged, values are. On a GPU your speed-up has to be that of the reference in the same run.
"""

import importlib.util
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.paths import REFERENCE
from harness.spec import check, device, generator, learner

compiled = learner("inference.compiled")

ROUNDS = 25
SHARE = 0.85  # of the reference's speed-up, on a GPU: two runs of the same code differ as much

pytestmark = pytest.mark.benchmark


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setenv("KATA_RUNG_SECONDS", "1800")  # cold compilations take their time
    yield
    torch._dynamo.reset()


def on_gpu():
    return device().type == "cuda"


def reference():
    """The reference's module, beside whatever is installed as yours."""
    name = "reference_of_kata_07"
    if name not in sys.modules:
        file = REFERENCE / "recsys" / "inference" / "compiled.py"
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# --- what is compiled -----------------------------------------------------------------------------


class Cross(nn.Module):
    """Three cross layers of DCN-v2."""

    def __init__(self, width=256):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x0):
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


class Tower(nn.Module):
    """Four ids, embedded side by side, and a network on top; unit vectors."""

    def __init__(self, rows=5_000, width=32):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(4))
        self.layers = nn.Sequential(
            nn.Linear(4 * width, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64)
        )

    def forward(self, ids):
        parts = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        return F.normalize(self.layers(torch.cat(parts, dim=1)), dim=1)


class TwoTowers(nn.Module):
    """The in-batch loss of a user tower and an item tower."""

    def __init__(self):
        super().__init__()
        self.user, self.item = Tower(), Tower()

    def forward(self, users, items):
        scores = self.user(users) @ self.item(items).T / 0.05
        return F.cross_entropy(scores, torch.arange(len(users), device=users.device))


def made(name):
    """A model and two inputs for it: of the size that is measured, and a smaller one."""
    torch.manual_seed(0)
    g = generator(1)
    sizes = (8192, 4096) if on_gpu() else (1024, 512)

    def ids(rows):
        return torch.randint(5_000, (rows, 4), generator=g).to(device())

    def floats(rows):
        return torch.randn(rows, 256, generator=g).to(device())

    model, draw = {
        "cross network": (Cross, lambda rows: (floats(rows),)),
        "tower": (Tower, lambda rows: (ids(rows),)),
        "training step": (TwoTowers, lambda rows: (ids(rows // 4), ids(rows // 4))),
    }[name]
    return model().to(device()), [draw(rows) for rows in sizes]


# --- measuring ------------------------------------------------------------------------------------


def prepared(implementation, name, mode=None):
    """A call of the compiled model, and the seconds of its compilation without any cache."""
    import torch._inductor.config as inductor

    model, inputs = made(name)
    torch._dynamo.reset()
    with inductor.patch(force_disable_caches=True):
        fast = implementation.compile_model(model, mode=mode)
        seconds = implementation.warm_up(fast, inputs[:1], grad=name == "training step")
    return call(name, model, fast, inputs[0]), seconds


def call(name, model, forward, inputs):
    """What is timed: a forward pass without gradients, or a whole training step."""
    if name != "training step":
        return torch.no_grad()(lambda: forward(*inputs))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        optimizer.zero_grad()
        loss = forward(*inputs)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def report(title, lines, capsys):
    with capsys.disabled():
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}")


def speed_up(name, mode, capsys):
    """Print a table and hold the speed-up against the reference's, on a GPU."""

    rivals = {"yours": compiled} | ({"reference": reference()} if on_gpu() else {})
    model, inputs = made(name)
    functions = {"eager": call(name, model, model, inputs[0])}
    lines, notes = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for who, implementation in rivals.items():
            functions[who], seconds = prepared(implementation, name, mode)
            notes.append(f"compilation of {who}: {seconds:.1f} s cold")
    if any(issubclass(each.category, RuntimeWarning) for each in caught):
        notes.append("no C++ compiler works here: 'compiled' is traced and runs eagerly")
    wait = torch.cuda.synchronize if on_gpu() else None
    timings = compiled.benchmark(functions, warmup=5, rounds=ROUNDS, synchronize=wait)
    eager = timings["eager"].median
    for who, t in timings.items():
        low, median, high = (1e3 * x for x in (t.low, t.median, t.high))
        lines.append(f"{who:<10} {median:9.3f} ms ({low:.3f} to {high:.3f}), "
                     f"{eager / t.median:.2f} times as fast as eager")  # fmt: skip
    title = f"{name}, mode {mode or 'default'}, {device().type}, {torch.get_num_threads()} threads"
    report(f"{title}: median (quartiles) of {ROUNDS}", [*lines, *notes], capsys)
    if on_gpu():
        gain, best = (eager / timings[who].median for who in ("yours", "reference"))
        check(gain >= SHARE * best, f"at least {SHARE:.0%} of the reference's {best:.2f} times",
              came_back=f"{gain:.2f} times as fast as eager")  # fmt: skip


def values(name, mode):
    """As near to float64 as eager code is: compiled code rounds in other places."""
    model, inputs = made(name)
    fast = compiled.compile_model(model, mode=mode)
    with torch.no_grad():
        for each in inputs:
            mine, eager = fast(*each).double(), model(*each).double()
            wide = [x.double() if x.is_floating_point() else x for x in each]
            exact = made(name)[0].double()(*wide)
            error, allowed = (float((x - exact).abs().max()) for x in (mine, eager))
            check(error <= 2 * allowed + 1e-5, f"an error of at most 2 * {allowed:.1e} + 1e-5",
                  came_back=f"{error:.1e}", what=f"compiled {name} against float64")  # fmt: skip


@pytest.mark.parametrize("name", ["cross network", "tower", "training step"])
def test_speed(name, capsys):
    """Compiled code is right; on a GPU it is as fast as the reference makes it."""
    values(name, None)
    speed_up(name, None, capsys)


def test_cuda_graphs(capsys):
    """Mode reduce-overhead replays CUDA graphs: an output is only yours until the next call."""
    if not on_gpu():
        pytest.skip("CUDA graphs need a GPU: --device cuda")
    model, inputs = made("cross network")
    fast = compiled.compile_model(model, mode="reduce-overhead")
    batches = [inputs[0][0], inputs[0][0].flip(0) * 0.5]
    with torch.no_grad():
        compiled.warm_up(fast, [(x,) for x in batches] * 2)
        kept, cloned = [], []
        for x in batches:
            torch.compiler.cudagraph_mark_step_begin()
            kept.append(fast(x))
            cloned.append(kept[-1].clone())
        for i, x in enumerate(batches):
            error = float((cloned[i] - model(x)).abs().max())
            check(error < 1e-2, "a clone keeps the output of a call", came_back=error,
                  what=f"largest difference of batch {i} from eager")  # fmt: skip
        try:
            overwritten = not torch.equal(kept[0], cloned[0])
        except RuntimeError as error:  # torch says so since 2.1
            overwritten = "overwritten" in str(error)
    check(overwritten, "the output that was kept without a clone is gone: graphs are replayed",
          came_back="it is still there", call="compile_model(model, mode='reduce-overhead')")
    speed_up("cross network", "reduce-overhead", capsys)
