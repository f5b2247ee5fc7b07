"""What the training loop may cost (kata 05)."""

import torch
from torch import nn

from harness.cost import count
from harness.spec import check, device, learner, rung

loop = learner("training.loop")


def layers(number):
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(number)]).to(device())


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


@rung(
    hints=[
        "Where do you need a loss as a number, and how often must you really look?",
        "float(loss), loss.item(), `if norm > limit`, print(loss): each makes the CPU wait until "
        "the GPU has done all that is queued. Keep tensors; read them once, at the epoch's end.",
        "losses.append(loss) in the epoch, torch.stack(losses).tolist() after it; "
        "torch.optim.AdamW(..., fused=True).",
    ]
)
def test_nothing_waits():
    """No step waits for the device, an epoch does once, and the optimizer is one fused kernel."""
    model, x = layers(2), torch.linspace(-1, 1, 120, device=device()).reshape(40, 3)
    batches = [{"x": x[:3]}, {"x": x[3:8]}]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for limit in (0.0, 1e-3, 1e3):
        cost = count(
            lambda limit=limit: loop.train_step(model, loss_fn, sgd, batches, max_grad_norm=limit)
        )
        check(not cost.syncs, "a step that reads no number from the device",
              came_back=f"it waits for {', '.join(cost.syncs)}",
              call=f"train_step(..., max_grad_norm={limit:g})")  # fmt: skip
    operations = []
    for number in (2, 6):
        model = layers(number)
        optimizer = loop.make_optimizer(model, lr=0.1)
        loss_fn(model, batches[0]).backward()
        optimizer.step()
        operations.append(count(optimizer.step).operations)
    check(operations[0] == operations[1], "as many operations for 12 parameters as for 4: fused",
          came_back=f"{operations[0]} for 4 parameters, {operations[1]} for 12",
          call="make_optimizer(model).step()")  # fmt: skip
    waits = []
    for rows in (4, 20):
        config = loop.FitConfig(epochs=2, batch_size=2, lr=0.1, max_grad_norm=1.0)
        cost = count(
            lambda rows=rows, config=config: loop.fit(  # no metric, no checkpoint: they may wait
                layers(2), loss_fn, rows, lambda index: {"x": x[index]}, config
            )
        )
        waits.append(cost.syncs)
    check(len(waits[0]) == len(waits[1]), "as many waits in epochs of 10 steps as of 2",
          came_back=f"{len(waits[0])} in 2 epochs of 2 steps, {len(waits[1])} in 2 epochs of 10: "
          f"{', '.join(dict.fromkeys(waits[1]))}", call="fit")  # fmt: skip
    check(len(waits[1]) <= 4, "the losses of an epoch are read at once, when it is over",
          came_back=f"{len(waits[1])} waits in 2 epochs", call="fit")  # fmt: skip
