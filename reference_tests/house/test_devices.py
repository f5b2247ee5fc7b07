"""Device bugs without a GPU: what is found, what is let pass, and what stays unsaid."""

import copy
import io
import os
import textwrap
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import devices, overlay, spec
from harness.devices import other_device_findings
from harness.message import KataFailure

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__.strip("_")] = function
    return function


def network(device):
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.1), nn.Linear(4, 2)).to(
        device
    )


# --- what works: the device knows what katas need -------------------------------------------------


@scenario
def making(device):
    some = torch.ones(2)
    return [
        torch.zeros(3, device=device),
        torch.tensor([1.0, 2.0], device=device),
        torch.as_tensor([1], device=str(device)),
        torch.from_numpy(np.ones(2)).to(device),
        some.to(device),
        some.cuda(),
        some.pin_memory().to(device, non_blocking=True),
        torch.arange(3, device=device).to(torch.float64),
        torch.zeros(3).to(torch.ones(1, device=device)),
        torch.ones(2, device=device).new_zeros(3),
        torch.empty_like(torch.ones(2, device=device)),
    ]


@scenario
def training(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    early = torch.optim.AdamW(model.parameters())  # keeps the parameters through .to
    model.to(device)
    optimizers = [early, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]
    optimizers += [torch.optim.AdamW(model.parameters(), fused=True)]
    optimizers += [torch.optim.AdamW(model.parameters(), foreach=True)]
    x, label = torch.randn(5, 3, device=device), torch.tensor([0, 1, 1, 0, 1], device=device)
    before = model[0].weight.detach().clone()
    for optimizer in optimizers:
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), label)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert not torch.equal(before, model[0].weight)
    return model, loss, [p.grad for p in model.parameters()]


@scenario
def embeddings(device):
    ids, offsets = torch.tensor([1, 2, 0], device=device), torch.tensor([0, 1], device=device)
    tables = [nn.Embedding(5, 3, padding_idx=0, device=device)]
    tables += [nn.EmbeddingBag(5, 3, mode=mode).to(device) for mode in ("sum", "mean", "max")]
    outs = [tables[0](ids), *(table(ids, offsets) for table in tables[1:])]
    sum(out.square().sum() for out in outs).backward()
    return outs, [table.weight.grad for table in tables]


@scenario
def operations(device):
    x = torch.randn(4, 6, device=device).requires_grad_()
    value, index = x.topk(2)
    places = torch.tensor([0, 1, 2, 0], device=device)
    outs = [
        value,
        x.gather(1, index),
        torch.zeros(4, 6, device=device).scatter(1, index, value),
        torch.zeros(3, 6, device=device).index_add(0, places, x),
        x.max(1).values,
        F.normalize(x, dim=1),
        (x @ x.T).softmax(1).masked_fill(torch.eye(4, dtype=torch.bool, device=device), 0.0),
        torch.einsum("ij,kj->ik", x, x),
        F.scaled_dot_product_attention(x[None], x[None], x[None]),
        F.binary_cross_entropy_with_logits(x, torch.ones_like(x)),
        torch.where(x > 0, x, 0.0),
        x.logsumexp(1),
        x.cumsum(0),
    ]
    sum(out.sum() for out in outs).backward()
    return outs, index, x.grad, F.one_hot(places, 3), x.sort(1), torch.randperm(4, device=device)


@scenario
def mixtures_that_torch_allows(device):
    x = torch.randn(4, 3, device=device)
    model = network(device)
    model.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    with torch.no_grad():
        model[0].weight.copy_(torch.zeros(4, 3))
    x[torch.tensor([0])] = 1.0  # indices of the CPU, a number
    return x[torch.tensor([0, 1])], x * torch.tensor(2.0), model, copy.deepcopy(model)


@scenario
def generators(device):
    generator = torch.Generator(device=device).manual_seed(3)
    assert generator.device == device and isinstance(generator, torch.Generator)
    assert isinstance(torch.Generator(), torch.Generator)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1)).to(device)
    return order, torch.randn(3, generator=generator, device=device)


@scenario
def checkpoints(device):
    model, file = network(device), io.BytesIO()
    for where in (device, "cpu"):
        file.seek(0)
        torch.save({"model": model.state_dict(), "rng": torch.cuda.get_rng_state()}, file)
        file.seek(0)
        model.load_state_dict(torch.load(file, map_location=where, weights_only=True)["model"])
    return model


@scenario
def own_backward(device):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 2 * x * torch.ones(3, device=x.device)

    x = torch.randn(3, device=device).requires_grad_()
    Square.apply(x).sum().backward()
    return x.grad


@scenario
def default_device(device):
    with torch.device(device), torch.inference_mode():
        return nn.Linear(3, 2)(torch.zeros(4, 3))


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_is_found_in_right_code(name):
    run = other_device_findings(SCENARIOS[name])
    assert (run.findings, run.inconclusive) == ([], "")


def test_values_are_those_of_the_cpu(tmp_path):
    """The parent cannot see them: the child writes them down."""

    def found(device):
        out = torch.arange(4.0, device=device).sqrt().sum()
        (tmp_path / device.type).write_text(repr(out.item()))
        return out

    spec.assert_device_safe(found)
    there, here = ((tmp_path / name).read_text() for name in ("cuda", "cpu"))
    assert there == here and here.startswith("4.146")


# --- what is found --------------------------------------------------------------------------------


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.mask = torch.ones(3)  # no buffer: .to does not move it


WRONG = {
    "add": lambda d: torch.ones(3, device=d) + torch.arange(3),
    "mul": lambda d: (lambda half: half.scale * half.mask)(Half().to(d)),
    "embedding": lambda d: nn.Embedding(5, 3).to(d)(torch.tensor([1])),
    "masked_fill": lambda d: torch.ones(2, 2, device=d).masked_fill(torch.eye(2) > 0, 0.0),
    "nll_loss": lambda d: F.cross_entropy(torch.randn(4, 4, device=d), torch.arange(4)),
    "embedding_bag": lambda d: F.embedding_bag(
        torch.tensor([1], device=d), torch.ones(3, 3, device=d), torch.tensor([0])
    ),
    "index ": lambda d: torch.ones(4)[torch.tensor([1], device=d)],
    "index_add": lambda d: torch.zeros(3, device=d).index_add(
        0, torch.tensor([1]), torch.ones(1, device=d)
    ),
    "stack": lambda d: torch.stack([torch.tensor(0.0), torch.ones(3, device=d).sum()]),
    "add mixed": lambda d: torch.zeros(()).add_(torch.ones(3, device=d).sum()),
    "numpy": lambda d: torch.ones(3, device=d).numpy(),
    "numpy() of": lambda d: np.asarray(torch.ones(3, device=d)),
    "generator of the CPU": lambda d: torch.randn(3, device=d, generator=torch.Generator()),
    "generator of the device": lambda d: torch.randn(3, generator=torch.Generator(d)),
    "the result is on the CPU": lambda d: torch.ones(3, device=d).cpu(),
    "result[1] is": lambda d: (torch.ones(3, device=d), torch.zeros(2)),
    "loss is on the CPU": lambda d: {"loss": torch.tensor(torch.ones(3, device=d).sum().item())},
    "scale is on the CPU": lambda d: Half(),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_device_bug(text):
    run = other_device_findings(WRONG[text])
    assert [text in finding.text for finding in run.findings] == [True], run
    with pytest.raises(KataFailure):
        spec.assert_device_safe(WRONG[text])


def test_a_bug_in_the_backward_pass():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.full((3,), 2.0)

    def found(device):
        x = torch.ones(3, device=device, requires_grad=True)
        Twice.apply(x).sum().backward()
        return x.grad

    assert "mul mixed" in other_device_findings(found).findings[0].text


def test_the_message_names_the_line(tmp_path):
    models = tmp_path / "recsys" / "models"
    models.mkdir(parents=True)
    source = """
        import torch

        def places(x):
            number = torch.arange(len(x))
            return x + number

        def moved(x):
            total = x.sum().cpu()
            return total * 2
        """
    (models / "placed.py").write_text(textwrap.dedent(source).lstrip())
    with overlay.using([overlay.Root("here", tmp_path)]):
        placed = spec.learner("models.placed")
        with pytest.raises(KataFailure) as caught:
            spec.assert_device_safe(lambda device: placed.places(torch.ones(3, device=device)))
        assert [(label, text) for label, text in caught.value.facts if label != "called"] == [
            (
                "came back",
                "add mixed a tensor on the device ([3], float32) with one on the CPU ([3], int64)",
            ),
            ("expected", "every tensor that is made is made on the device of the inputs"),
            ("in", "here/recsys/models/placed.py:5 places"),
            ("", "return x + number"),
            ("made in", "here/recsys/models/placed.py:4 places"),
            ("", "number = torch.arange(len(x))"),
        ]
        with pytest.raises(KataFailure) as caught:
            spec.assert_device_safe(lambda device: placed.moved(torch.ones(3, device=device)))
        assert ("", "return total * 2") in caught.value.facts


# --- what stays unsaid ----------------------------------------------------------------------------


def crash(device):
    if device.type != "cpu":
        os.kill(os.getpid(), 11)


def unsupported(device):
    x = torch.ones(3, device=device)
    if device.type != "cpu":
        torch.ops.aten._cudnn_rnn_flatten_weight([x], 1, 1, 0, 0, 1, 1, False, False)
    return x


INCONCLUSIVE = {
    "": unsupported,
    "CUDA": lambda d: torch.cuda.Stream() if d.type != "cpu" else None,
    "ValueError: x": lambda d: exec("raise ValueError('x')") if d.type != "cpu" else None,
    "ended early": crash,
    "Exit": lambda d: pytest.exit("now") if d.type != "cpu" else None,
}


@pytest.mark.parametrize("why", INCONCLUSIVE)
def test_what_is_inconclusive_is_not_red(why):
    run = spec.assert_device_safe(INCONCLUSIVE[why])
    assert run.findings == [] and run.inconclusive and why in run.inconclusive
    assert spec.assert_no_sync(INCONCLUSIVE[why]).inconclusive


def test_a_timeout_is_inconclusive():
    start = time.monotonic()
    run = other_device_findings(lambda device: time.sleep(60), seconds=0.3)
    assert run.inconclusive == "it took longer than 0.3 s" and time.monotonic() - start < 10


def test_an_error_on_the_cpu_is_an_error():
    with pytest.raises(ZeroDivisionError):
        spec.assert_device_safe(lambda device: 1 / 0)


def test_what_the_code_catches_itself_is_no_finding():
    def careful(device):
        x = torch.ones(3, device=device)
        try:
            return x + torch.arange(3)
        except RuntimeError:
            return x + torch.arange(3, device=device)

    assert other_device_findings(careful).findings == []


# --- the machine ----------------------------------------------------------------------------------


def test_synchronisations_are_those_of_the_device():
    def waits(device):
        x, there = torch.ones(3), torch.ones(3, device=device)
        x.tolist(), x.sum().item(), there.to(torch.float64)
        x.copy_(there)
        torch.cuda.synchronize()
        return [there.tolist(), there.sum().item(), there[there > 0].to(device), there.cpu()][:1]

    if not torch.cuda.is_available():
        run = other_device_findings(waits)
        names = ["to", "synchronize", "tolist", "item", "boolean mask", "cpu"]
        assert run.cost.syncs == names


def test_the_same_in_this_process():
    """Where a fork is not safe; and everything is put back."""
    before = (torch.Generator, torch.load, torch.cuda.synchronize)
    assert devices.observe(SCENARIOS["training"]).inconclusive == ""
    assert "add mixed" in devices.observe(WRONG["add"]).findings[0].text
    assert devices.observe(lambda device: 1 / 0).inconclusive.startswith("ZeroDivisionError")
    assert before == (torch.Generator, torch.load, torch.cuda.synchronize)
    assert not torch.__future__.get_swap_module_params_on_conversion()
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    assert type(model.weight) is nn.Parameter and model.weight.grad.device.type == "cpu"


def test_it_costs_next_to_nothing():
    def lookup(device):
        return nn.Embedding(5, 3, device=device)(torch.tensor([1], device=device)).sum()

    other_device_findings(lookup)
    start = os.times()
    other_device_findings(lookup)
    used = [end - begin for begin, end in zip(start, os.times(), strict=True)][:4]
    assert sum(used) < 0.3  # CPU time, of the child too: the machine may be busy
