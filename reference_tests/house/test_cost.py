"""What calls cost, counted: and what the helpers that hold budgets say."""

import textwrap

import pytest
import torch
import torch.nn.functional as F

from harness import overlay, spec
from harness.cost import count
from harness.message import KataFailure

N, D = 6, 4


@pytest.fixture
def written(tmp_path):
    """Makes a module of the learner's from source."""
    before = overlay.installed() if overlay.is_installed() else None
    models = tmp_path / "recsys" / "models"
    models.mkdir(parents=True)

    def write(source):
        (models / "costly.py").write_text("import torch\n\n" + textwrap.dedent(source))
        overlay.install([overlay.Root("here", tmp_path)])
        return spec.learner("models.costly")

    yield write
    overlay.uninstall()
    overlay.purge()
    if before is not None:
        overlay.install(before)


def facts(check, *args, **kwargs):
    with pytest.raises(KataFailure) as caught:
        check(*args, **kwargs)
    found = {}
    for label, text in caught.value.facts:
        found[label or "source"] = text
    return found


# --- counting -------------------------------------------------------------------------------------


def test_operations_and_views():
    x = torch.ones(N, D)
    cost = count(lambda: (x.T @ x[:3].reshape(D, -1)[:, :1].expand(D, N).T).relu())
    assert torch.equal(cost.result, torch.full((D, D), float(N)))
    assert cost.operations == 2 and cost.views >= 4
    assert (cost.allocated_bytes, cost.largest_bytes) == (128, 64)
    assert count(lambda: x.add_(0)).allocated_bytes == 0
    assert count(lambda: None).largest is None


def test_the_largest_says_what_it_is():
    x = torch.ones(N, D, dtype=torch.float64)
    made = count(lambda: (x[:, None] - x).square().sum()).largest
    assert (made.bytes, made.operation) == (N * N * D * 8, "sub")
    assert (made.shape, made.dtype) == ([N, N, D], "float64")


def test_an_expanded_tensor_is_as_large_as_its_storage():
    assert count(lambda: torch.ones(1).expand(1000) + 0 * torch.ones(1)).largest_bytes == 4000
    assert count(lambda: torch.ones(1).expand(1000)).largest_bytes == 4


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_training_is_counted_and_not_changed(options):
    def trained(run):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(D, 3), torch.nn.Dropout(0.5))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        x, label = torch.randn(N, D), torch.arange(N) % 3

        def step():
            optimizer.zero_grad()
            F.cross_entropy(model(x), label).backward()
            optimizer.step()

        costs = [run(step) for _ in range(3)]
        return [p.detach().clone() for p in model.parameters()], costs[-1]

    plain, _ = trained(lambda step: step())
    counted, cost = trained(count)
    for one, other in zip(plain, counted, strict=True):
        assert torch.equal(one, other)
    forward = count(lambda: F.cross_entropy(torch.zeros(N, 3), torch.zeros(N).long())).operations
    assert cost.operations > forward + 5  # backward and optimizer too
    assert cost.operations < (20 if "fused" in options else 60)


def test_sparse_gradients_are_counted():
    table = torch.nn.EmbeddingBag(100, D, sparse=True)
    ids, offsets = torch.arange(3), torch.tensor([0, 2])
    assert count(lambda: table(ids, offsets).sum().backward()).largest_bytes < 100 * D * 4


x, ids, mask = torch.arange(1.0, N + 1), torch.tensor([2, 0, 1]), torch.arange(N) > 2


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("item", lambda: x.sum().item()),
        ("tolist", lambda: x.tolist()),
        ("cpu", lambda: x.cpu()),
        ("to", lambda: x.to("cpu")),
        ("to", lambda: x.to(device="cpu")),
        ("numpy", lambda: x.numpy()),
        ("numpy", lambda: __import__("numpy").asarray(x)),
        ("bool", lambda: 1 if x[0] > 0 else 0),
        ("int", lambda: int(ids[0])),
        ("float", lambda: float(x[0])),
        ("index", lambda: range(ids[0])),
        ("in", lambda: 2 in ids),
        ("format", lambda: f"{x[0]:.3f}"),
        ("repr", lambda: str(x)),
        ("item", lambda: x[: ids[0]]),
        ("nonzero", lambda: mask.nonzero()),
        ("nonzero", lambda: torch.where(mask)),
        ("boolean mask", lambda: x[mask]),
        ("boolean mask", lambda: x.clone().__setitem__(mask, x[:3])),
        ("masked_select", lambda: x.masked_select(mask)),
        ("unique", lambda: ids.unique()),
        ("unique", lambda: torch.unique(ids, return_inverse=True)),
        ("unique", lambda: ids.unique_consecutive()),
        ("repeat_interleave", lambda: x[:3].repeat_interleave(ids)),
        ("equal", lambda: torch.equal(x, x)),
        ("allclose", lambda: torch.allclose(x, x)),
        ("bincount", lambda: ids.bincount()),
    ],
)
def test_a_synchronisation(name, call):
    assert count(call).syncs == [name]


def test_what_waits_for_nothing():
    def free():
        x[ids], x.topk(2), torch.where(mask, x, 0.0), x.masked_fill(mask, 0.0)
        x.clone()[mask] = 0.0  # the same as masked_fill
        x[:3].repeat_interleave(ids, output_size=3), x.isfinite().all(), x.to(torch.float64)
        list(x), len(x), x.shape, x.device, x.to(x.device)
        return torch.nn.utils.clip_grad_norm_([torch.ones(3, requires_grad=True)], 1.0)

    assert count(free).syncs == []


def test_an_error_passes_through_and_nothing_is_left_on():
    with pytest.raises(ZeroDivisionError):
        count(lambda: 1 / 0)
    assert count(lambda: x + 1).operations == 1


def test_compiled_code_is_refused():
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    compiled(x)
    with pytest.raises(RuntimeError, match="compile"):
        count(lambda: compiled(x))
    assert torch.equal(compiled(x), x * 2)


# --- what a rung says -----------------------------------------------------------------------------

ROWS = """
def total(x):
    return x.sum(1)

def looped(x):
    return torch.stack([row.sum() for row in x])

def sliced(x):
    return torch.cat([x[i : i + 1, 0] for i in range(len(x))])

def chunked(x):
    return torch.cat([part.sum(1) for part in x.split(32)])
"""


def test_a_loop_over_rows(written):
    rows = written(ROWS)

    def of(function):
        return lambda size: lambda: function(torch.ones(size, D))

    spec.assert_scales(of(rows.total), allowance=0)
    spec.assert_scales(of(rows.chunked))
    found = facts(spec.assert_scales, of(rows.looped), call="looped(x)")
    assert found["called"] == "looped(x)"
    assert found["came back"] == "67 operations at size 64, 11 at size 8"
    assert "at most 28 more" in found["expected"]
    assert found["most in"].endswith("costly.py:8 looped")
    assert found["source"] == "return torch.stack([row.sum() for row in x])"
    facts(spec.assert_scales, of(rows.sliced))
    facts(spec.assert_scales, of(rows.chunked), allowance=0, sizes=(8, 512))
    facts(spec.assert_scales, lambda size: rows.looped(torch.ones(size, D)))  # preparation and all


def test_a_loop_in_the_backward_pass_alone(written):
    rows = written("""
        class Rows(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return torch.stack([row * 2 for row in grad])
        """)

    def trained(size):
        x = torch.ones(size, D, requires_grad=True)
        return lambda: rows.Rows.apply(x).sum().backward()

    facts(spec.assert_scales, trained)


def test_a_large_intermediate(written):
    distance = written("""
        def direct(x):
            return (x[:, None] - x).square().sum(2)

        def expanded(x):
            norm = x.square().sum(1)
            return norm[:, None] + norm - 2 * x @ x.T
        """)
    x = torch.ones(N, D)
    spec.assert_budget(lambda: distance.expanded(x), largest=N * N * 4, operations=8)
    limit = {"largest": N * N * 4, "why": "N * N floats, the result"}
    found = facts(spec.assert_budget, lambda: distance.direct(x), **limit)
    assert found["came back"] == "a tensor of 576 bytes: sub makes [6, 6, 4], float32"
    assert found["expected"] == "at most 144 bytes for any one tensor: N * N floats, the result"
    assert "costly.py:5 direct" in found["in"] and "x[:, None]" in found["source"]
    assert facts(spec.assert_budget, lambda: distance.direct(x), allocated=500)
    assert facts(spec.assert_budget, lambda: distance.direct(x), operations=2)["came back"] == "3"


def test_no_synchronisation(written):
    steps = written("""
        def step(model, x, optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        def logged(model, x, optimizer):
            loss = step(model, x, optimizer)
            return loss.item()

        def guarded(x):
            if x.device.type == "cpu" and bool((x < 0).any()):
                raise ValueError("below 0")
            if not x.is_cuda and bool((x < 0).any()) or x.is_cpu and bool((x < 0).any()):
                raise ValueError("below 0")
            if x.device.type != "cuda" and bool((x < 0).any()):
                raise ValueError("below 0")
            return x.sqrt()

        def unguarded(x):
            if (x < 0).any():
                raise ValueError("below 0")
            return x.sqrt()
        """)

    def scenario(function, optimizer=torch.optim.AdamW):
        def prepare(device):
            model = torch.nn.Linear(D, 1).to(device)
            x = torch.ones(N, D, device=device)
            assert x.sum().item() == N * D  # the preparation may wait
            return lambda: function(model, x, optimizer(model.parameters()))

        return prepare

    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        assert spec.assert_no_sync(scenario(steps.step, optimizer)).inconclusive == ""
    found = facts(spec.assert_no_sync, scenario(steps.logged), call="logged(model)")
    assert found["came back"] == "it waits for the device once: item"
    assert found["in"].endswith("logged") and found["source"] == "return loss.item()"
    spec.assert_no_sync(scenario(steps.logged), ignore=["item"])

    def input_of(function):
        return lambda device: function(torch.ones(N, device=device))

    spec.assert_no_sync(input_of(steps.guarded))
    assert "bool" in facts(spec.assert_no_sync, input_of(steps.unguarded))["came back"]
    with pytest.raises(ValueError, match="below 0"):  # errors are errors
        spec.assert_no_sync(lambda device: steps.guarded(-torch.ones(N, device=device)))
