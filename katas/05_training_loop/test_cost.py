"""What the training loop costs, and what it does on another device (kata 05)."""

import torch
from torch import nn

from harness.cost import count
from harness.devices import other_device_findings
from harness.spec import assert_device_safe, assert_no_sync, check, device, learner, rung

loop = learner("training.loop")


def layers(number, place):
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(number)]).to(place)


def rows(number, place):
    return {"x": torch.linspace(-1, 1, 3 * number).reshape(number, 3).to(place)}


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


@rung(
    hints=[
        "Where do you need a loss as a number, and how often must you really look?",
        "float(loss), loss.item(), `if norm > limit`, print(loss): each makes the CPU wait until "
        "the GPU has done all that is queued. Keep tensors; read them once, at the epoch's end.",
        "losses.append(loss) in the epoch, torch.stack(losses).tolist() after it; the generator "
        "and randperm with device=device; torch.optim.AdamW(..., fused=True).",
    ]
)
def test_stays_on_the_device():
    """A step never waits for the device, an epoch does once; the optimizer is one fused kernel."""

    def steps(place):
        model, batches = layers(2, place), [rows(3, place), rows(5, place)]
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)

        def run():
            for limit in (0.0, 1e-3, 1e3):
                loop.train_step(model, loss_fn, sgd, batches, max_grad_norm=limit)

        return run

    assert_no_sync(steps, call="train_step, without a limit, above it, below it")

    def indices(place):
        return list(loop.index_batches(9, 2, seed=1, epoch=0, device=place))

    assert_device_safe(indices, call="index_batches(9, 2, device=device)")

    def epochs(place):
        model, x, config = layers(2, place), rows(20, place)["x"], loop.FitConfig(2, 2, lr=0.1)
        return lambda: loop.fit(model, loss_fn, 20, lambda index: {"x": x[index]}, config)

    waits = other_device_findings(epochs).cost.syncs
    check(len(waits) <= 4, "the losses of an epoch are read at once, when it is over",
          came_back=f"it waits {len(waits)} times in 2 epochs of 10 steps: "
          f"{', '.join(dict.fromkeys(waits))}", call="fit")  # fmt: skip
    operations = []
    for number in (2, 6):
        model = layers(number, device())
        optimizer = loop.make_optimizer(model, lr=0.1)
        loss_fn(model, rows(4, device())).backward()
        optimizer.step()
        operations.append(count(optimizer.step).operations)
    check(operations[0] == operations[1], "as many operations for 12 parameters as for 4: fused",
          came_back=f"{operations[0]} for 4 parameters, {operations[1]} for 12",
          call="make_optimizer(model).step()")  # fmt: skip
