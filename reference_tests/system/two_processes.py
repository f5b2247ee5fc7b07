"""What each of the processes of test_distributed.py does; `torchrun` starts it.

    torchrun --standalone --nproc-per-node 2 two_processes.py FOLDER

For each variant of the loss the loop of kata 05 takes six optimizer steps; the gradients of each
and the last weights go to FOLDER, for each process.
"""

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness import overlay
from harness.paths import ROOT

USERS, ITEMS, EXAMPLES, BATCH = 5, 7, 48, 16  # few items: many accidental hits across processes


def examples():
    """Columns of training examples, log q and weights, all in float64."""
    g = torch.Generator().manual_seed(1)
    target = (torch.rand(EXAMPLES, generator=g) ** 2 * ITEMS).long()
    columns = {
        "history": torch.randint(0, ITEMS + 1, (EXAMPLES, 4), generator=g),
        "target": target,
        "weight": torch.rand(EXAMPLES, generator=g, dtype=torch.float64) + 0.1,
    }
    share = torch.bincount(target, minlength=ITEMS).double() + 1
    return columns, (share / share.sum()).log()


def two_towers():
    from recsys.data.features import Feature
    from recsys.models.tower import TwoTower

    torch.manual_seed(0)
    history = Feature("history", "history", ITEMS + 1, table="item")
    item_id = Feature("item_id", "id", ITEMS + 1, table="item")
    return TwoTower([history], [item_id], 6, hidden_dims=(9,), max_history=4).double()


def train(model, loss, rows, symmetric=False):
    """Two epochs: the gradients of each step, the weights at the end, the losses of the epochs."""
    from recsys.training.loop import FitConfig, fit

    columns, log_q = examples()
    plain = getattr(model, "module", model)
    grads = []

    def loss_fn(model, batch):
        target = batch["target"]
        user, item = model(batch, {"item_id": target + 1})
        return loss(
            user,
            item,
            temperature=plain.temperature,
            item_ids=target,
            log_q=log_q[target],
            sample_weight=batch["weight"],
            symmetric=symmetric,
        )

    def keep(*_):
        grads.append({name: p.grad.clone() for name, p in plain.named_parameters()})

    hook = register_optimizer_step_pre_hook(keep)
    result = fit(
        model,
        loss_fn,
        EXAMPLES,
        lambda index: {name: column[rows(index)] for name, column in columns.items()},
        FitConfig(epochs=2, batch_size=BATCH, lr=0.01, weight_decay=0.1),
    )
    hook.remove()
    return {"grads": grads, "weights": plain.state_dict(), "losses": result.losses}


def main(folder):
    from recsys.training import distributed
    from recsys.training.losses import in_batch_softmax_loss

    def plain_all_gather(x):  # as many write it: no gradient, one's own rows put back
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach())
        parts[dist.get_rank()] = x
        return torch.cat(parts)

    def own_part(mine, shift):  # of a gathered vector only what is one's own, the rest harmless
        def gather(x):
            everything = right_gather(x)
            if x.dim() > 1 or x.is_floating_point() != mine:
                return everything
            first = len(x) * dist.get_rank()
            result = torch.full_like(everything, shift)
            result[first : first + len(x)] = x
            return result

        return gather

    right, right_gather = distributed.distributed_softmax_loss, distributed.gather
    variants = {
        "right": (right, right_gather, False),
        "symmetric": (right, right_gather, True),
        "all_gather without gradient": (right, plain_all_gather, False),
        "hits of one's own rows": (right, own_part(False, -1), False),
        "log q of one's own rows": (right, own_part(True, 0), False),
        "each process by itself": (in_batch_softmax_loss, right_gather, False),
    }
    for name, (loss, gather, symmetric) in variants.items():
        with mock.patch.object(distributed, "gather", gather):
            model = DistributedDataParallel(two_towers())
            done = train(model, loss, distributed.own_rows, symmetric)
        torch.save(done, Path(folder) / f"{name} {dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    overlay.install(overlay.resolve(["reference"], ROOT))
    main(sys.argv[1])
    dist.destroy_process_group()
