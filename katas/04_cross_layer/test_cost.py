"""Kata 04: what cross layers, the ranking model and its losses may cost, and where they run."""

import torch

from harness.spec import (
    assert_budget,
    assert_device_safe,
    assert_no_sync,
    assert_scales,
    device,
    learner,
    rung,
)

cross = learner("models.cross")
ranking = learner("models.ranking")
features = learner("data.features")


def numbers(*shape, place):
    """Numbers that differ."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=place) % 7 - 2.5).reshape(shape)


def model_and_batch(structure, rows, place):
    specs = [
        ("price", "dense", 2),
        ("plot", "text", 5),
        ("item", "id", 11, "item"),
        ("genres", "multi_hot", 7),
        ("seen", "history", 11, "item"),
    ]
    model = ranking.RankingModel(
        [features.Feature(*spec) for spec in specs], hidden_dims=(6, 4), structure=structure, rank=3
    )
    ids = torch.arange(rows * (rows + 1), device=place).reshape(rows, rows + 1)
    batch = {"price": numbers(rows, 2, place=place), "plot": numbers(rows, 5, place=place)}
    batch.update(item=ids[:, 0] % 11, genres=ids % 7, seen=ids * 3 % 11)
    return model.to(place), batch


def losses_of(rows, place):
    """The losses of some rows or lists, with the words for them."""
    logits = numbers(rows, 3, place=place).requires_grad_()
    labels, weight = (logits > 0).float(), logits.detach().abs()[:, 0]
    masked = torch.where(logits < -2, -torch.inf, logits)
    one, y = logits[:, 0], labels[:, 0]
    return {
        "binary_loss(logits, labels)": lambda: ranking.binary_loss(one, y),
        "binary_loss(logits, labels, sample_weight=weight)": (
            lambda: ranking.binary_loss(one, y, sample_weight=weight)
        ),
        "listwise_loss(logits, labels)": lambda: ranking.listwise_loss(masked, labels),
    }


def network_on(rows, place, rank):
    network, x0 = cross.CrossNetwork(4, 2, rank=rank).to(place), numbers(rows, 4, place=place)
    return lambda: network(x0)


def model_on(rows, place, structure):
    model, batch = model_and_batch(structure, rows, place)
    return lambda: model(batch)


CALLS = {  # what may be called on some rows of a device
    "CrossNetwork(4, 2)(x0)": lambda rows, place: network_on(rows, place, None),
    "CrossNetwork(4, 2, rank=2)(x0)": lambda rows, place: network_on(rows, place, 2),
    "model(batch), parallel": lambda rows, place: model_on(rows, place, "parallel"),
    "model(batch), stacked": lambda rows, place: model_on(rows, place, "stacked"),
}


@rung(
    hints=[
        "What is done for each row or list, and what once for all? Which tensor is as large as "
        "dim x dim for low rank, or as B x B for a loss?",
        "V first, then U: their product is never needed, and neither is the table of all products "
        "of x0 and xl. In a loss, an `if` on a value of a tensor waits for the GPU.",
        "(xl @ self.v.T) @ self.u.T; torch.where or masked_fill instead of `if total == 0`",
    ]
)
def test_cost():
    """No loop over rows, no W made of U and V, no table of all pairs, and losses never wait."""
    for dim, rank, rows in ((96, 2, 3), (24, None, 64), (24, 2, 64)):
        layer = cross.CrossLayer(dim, rank=rank).to(device())
        x0, xl = numbers(2, rows, dim, place=device())
        assert_budget(
            lambda f=layer, x0=x0, xl=xl: f(x0, xl).sum().backward(),
            largest=16 * max(rows * dim, dim * (rank or dim)),
            why="4 times the input or a parameter",
            call=f"CrossLayer({dim}, rank={rank})(x0[{rows}, {dim}], xl).sum().backward()",
        )
    for call, loss in losses_of(200, device()).items():
        why = "8 times the logits of 200 lists of 3"
        assert_budget(loss, largest=4 * 8 * 600, why=why, call=call)
        assert_no_sync(lambda place, call=call: losses_of(9, place)[call], call=call)
        assert_scales(lambda rows, call=call: losses_of(rows, device())[call], call=call)
    for call, made in CALLS.items():
        assert_scales(lambda rows, made=made: made(rows, device()), (4, 24), call=call)


@rung(
    hints=[
        "On a GPU nothing may be mixed with a tensor of the CPU.",
        "torch.arange, torch.zeros and torch.tensor make theirs on the CPU unless you say where.",
        "device=x.device, or x.new_zeros(...); constants as parameters or buffers of the module",
    ]
)
def test_on_a_gpu():
    """On a GPU everything stays on it: the layers, the model, the losses and their gradients."""

    def scenario(place):
        model, batch = model_and_batch("parallel", 5, place)
        outs = [made(5, place)() for made in CALLS.values()] + [model(batch)]
        outs += [loss() for loss in losses_of(5, place).values()]
        sum(out.sum() for out in outs).backward()
        return {"outs": outs, "gradients": [p.grad for p in model.parameters()]}

    assert_device_safe(scenario, call="CrossNetwork, RankingModel and the losses, all on a GPU")
