"""Kata 11: what attention, the tower and the loss cost, counted, and where they run."""

import torch

from harness.spec import (
    assert_budget,
    assert_device_safe,
    assert_no_sync,
    assert_scales,
    check,
    device,
    learner,
    rung,
)

sequence = learner("models.sequence")
embedding = learner("models.embedding")


def ids(*shape, most, place):
    """Integers from 1 to `most` in no obvious order."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=place) * 7 % most + 1).reshape(shape)


def numbers(*shape, place):
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=place) % 11 / 11 - 0.4).reshape(shape)


def tower_and_history(rows, places, place, *, dim=12, heads=2, most=50):
    tower = sequence.SequenceTower(
        embedding.EmbeddingTable(most + 1, dim),
        num_blocks=2,
        num_heads=heads,
        hidden_dim=2 * dim,
        max_history=places,
    )
    history = ids(rows, places, most=most, place=place)
    history[0, places // 2 :] = 0
    return tower.to(place), history


def loss_on(rows, place, *, places=4, items=30, sampled=0, dim=5):
    """A call of the loss, its inputs made before."""
    states = numbers(rows, places, dim, place=place).requires_grad_()
    catalogue = numbers(items, dim, place=place).requires_grad_()
    target = ids(rows, places, most=items, place=place)
    target[0, 1:] = 0
    options = {"temperature": torch.tensor(0.1, device=place).requires_grad_()}
    if sampled:
        options["sample"] = ids(sampled, most=items, place=place) - 1
        options["log_q"] = numbers(items, place=place)
    return lambda: sequence.next_item_loss(states, target, catalogue, **options)


def kept(function):
    """Bytes of each storage that is kept for the backward pass of what `function` gives."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return found.values()


@rung(
    hints=[
        "What is done for each row, place or head, and what once for all? Which tensor is as large "
        "as the table of the items, or as all pairs of places and items, twice?",
        "A matrix product keeps its inputs for the way back, a log-softmax its result. What does a "
        "division of the scores, or a softmax after it, keep?",
        "Divide the states by the temperature; leave log-softmax and the choice of the target to "
        "F.cross_entropy.",
    ]
)
def test_cost():
    """No loop, no copy of what is large: counted operations, and bytes kept for the way back."""
    for what, sizes, made in (
        ("rows", (4, 24), lambda n: tower_and_history(n, 6, device())),
        ("places", (4, 24), lambda n: tower_and_history(3, n, device())),
        ("heads", (2, 12), lambda n: tower_and_history(3, 6, device(), dim=12, heads=n)),
    ):

        def states(size, made=made):
            tower, history = made(size)
            return lambda: tower.states(history)

        assert_scales(states, sizes, call="tower.states(history)", what=f"more {what}")
    for rows, places, dim, most in ((9, 40, 12, 50), (5, 6, 24, 4000)):
        tower, history = tower_and_history(rows, places, device(), dim=dim, most=most)
        largest = 4 * max(rows * 2 * places**2, rows * places * 3 * dim)
        assert_budget(
            lambda f=tower, h=history: f.states(h),
            largest=largest,
            why="the scores (B, H, L, L), or q, k and v",
            call=f"SequenceTower of {most} items, width {dim}: states(history[{rows}, {places}])",
        )
    for sampled, candidates in ((0, 900), (60, 61)):
        call = "next_item_loss(states, target, catalogue, ...)"
        call = call.replace("...", "sample=sample, log_q=log_q") if sampled else call
        sizes = {"places": 8, "items": 900, "sampled": sampled}
        loss, pairs = loss_on(12, device(), **sizes), 4 * 12 * 8 * candidates
        why = f"a number for each of 96 places and {candidates} candidates"
        largest = max(2 * pairs, 4 * 5 * 900)  # or an index, which takes twice as much
        assert_budget(lambda f=loss: f().backward(), largest=largest, why=why, call=call)
        large = [size for size in kept(loss) if 4 * size > 3 * pairs]
        check(
            len(large) <= 1,
            f"at most one tensor of {pairs:,} bytes kept for the backward pass: {why}",
            came_back=f"{len(large)} of them",
            call=call,
        )
        assert_scales(lambda n, s=sampled: loss_on(n, device(), sampled=s), (4, 24), call=call)
        assert_no_sync(lambda place, s=sampled: loss_on(5, place, sampled=s), call=call)

    def serve(place):
        tower, history = tower_and_history(3, 6, place)
        return lambda: tower({"history": history})

    assert_no_sync(serve, call="tower(batch)")


@rung(
    hints=[
        "On a GPU nothing may be mixed with a tensor of the CPU.",
        "torch.arange, torch.ones and torch.tensor make theirs on the CPU unless you say where.",
        "torch.arange(length, device=x.device)",
    ]
)
def test_on_a_gpu():
    """On a GPU everything stays on it: pairs, the tower, both losses and their gradients."""

    def scenario(place):
        tower, history = tower_and_history(3, 6, place)
        pairs = sequence.training_pairs(ids(3, 7, most=50, place=place))
        outs = [tower.states(history), tower({"history": history})]
        outs += [tower({"history": history[:, :0]})]
        outs += [loss_on(3, place, sampled=s)() for s in (0, 7)]
        sum(out.sum() for out in outs).backward()
        grads = [p.grad for p in tower.parameters()]
        return {"pairs": pairs, "outs": outs, "gradients": grads}

    assert_device_safe(scenario, call="the tower and the loss, all on a GPU")
