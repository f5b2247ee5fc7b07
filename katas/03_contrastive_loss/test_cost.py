"""Kata 03: what the losses cost, counted, and what they do on another device."""

import torch

from harness.cost import count
from harness.devices import other_device_findings
from harness.spec import device, fail, generator, learner, rung

losses = learner("training.losses")

SMALL, LARGE = 24, 96  # rows
WIDTH = 32
ALLOWED = 16  # operations more for four times the rows
TABLES = 3  # of float64 scores, in one tensor


def batches(rows, place):
    """Arguments of both losses, with all options."""

    def draw(*shape):
        return torch.randn(shape, generator=generator(rows)).to(place)

    temperature = torch.tensor(0.1).to(place).requires_grad_()
    user, item = draw(rows, WIDTH).requires_grad_(), draw(rows, WIDTH).requires_grad_()
    ids = (torch.arange(rows) % (rows - 3)).to(place)
    weight = draw(rows).abs()
    in_batch = {"user": user, "item": item, "item_ids": ids, "log_q": -draw(rows).abs() - 2}
    in_batch |= {"temperature": temperature, "sample_weight": weight, "symmetric": True}
    full = {"user": user, "catalogue": item, "target": ids.flip(0)}
    full |= {"temperature": temperature, "sample_weight": weight}
    return {"in_batch_softmax_loss": in_batch, "full_softmax_loss": full}


def costs(rows):
    """What each loss costs, its backward pass with it."""
    for name, given in batches(rows, device()).items():
        loss = getattr(losses, name)
        yield name, count(lambda loss=loss, given=given: loss(**given).backward())


@rung(
    hints=[
        "A loss is called at every step: all rows at once, from one table of scores.",
        "A loop over rows starts operations for each of them, and (B, B, D) is D times too large. "
        "The message says which line.",
        "The (B, B) scores are one matrix product, user @ item.T.",
    ]
)
def test_cost():
    """The number of operations does not grow with B, and nothing is larger than the scores."""
    limit = TABLES * LARGE * LARGE * 8
    for (name, few), (_, many) in zip(costs(SMALL), costs(LARGE), strict=True):
        call = f"{name}(user[{LARGE}, {WIDTH}], ...).backward()"
        if many.operations > few.operations + ALLOWED:
            [(place, _)] = (many.by_place - few.by_place).most_common(1)
            fail(
                call=call,
                came_back=f"{few.operations} operations for {SMALL} rows, "
                f"{many.operations} for {LARGE}",
                expected=f"at most {ALLOWED} more: no Python loop over rows",
                more=place.facts() if place else (),
            )
        if many.largest_bytes > limit:
            made = many.largest
            fail(
                call=call,
                came_back=f"{made.operation} made {made.shape} {made.dtype}, {made.bytes:,} bytes",
                expected=f"nothing above {limit:,} bytes: scores are ({LARGE}, {LARGE})",
                more=made.place.facts() if made.place else (),
            )


@rung(
    hints=[
        "What is made inside has to be where the inputs are, and the host never looks at a value.",
        "torch.arange and torch.eye make theirs on the CPU unless you say where. An if on a "
        "tensor, .item() and an index by a boolean mask wait for the GPU.",
        "device=user.device, for what is kept between calls too; masked_fill and torch.where "
        "decide on the device.",
    ]
)
def test_on_a_gpu():
    """On a GPU everything stays there, and the host waits for nothing."""
    for name, options in batches(SMALL, device()).items():
        getattr(losses, name)(**options)  # what is wrong here too is another rung's business

        def scenario(place, name=name):
            given = batches(SMALL, place)[name]
            leaves = [x for x in given.values() if getattr(x, "requires_grad", False)]

            def work():
                loss = getattr(losses, name)(**given)
                loss.backward()
                return [loss, *(x.grad for x in leaves if x.grad is not None)]

            return work

        run = other_device_findings(scenario)
        call = f"{name}(user, ...).backward(), all on a GPU"
        for finding in run.findings[:1]:
            more = finding.place.facts() if finding.place else []
            more += finding.made.facts("made in") if finding.made else []
            where = "everything on the device of the inputs"
            fail(call=call, came_back=finding.text, expected=where, more=more)
        if run.cost.syncs:
            place = run.cost.sync_places[0]
            fail(
                call=call,
                came_back=f"the host waits for the device's value: {', '.join(run.cost.syncs[:4])}",
                expected="nothing is read back to the host",
                more=place.facts() if place else (),
            )
