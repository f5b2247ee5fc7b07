"""Train the retrieval model in several processes, which `torchrun` starts (docs/distributed.md).

    torchrun --standalone --nproc-per-node 2 -m harness.distributed --data ml-100k

Gradients are averaged by `DistributedDataParallel`, over gloo on CPUs and NCCL on GPUs; the batch
of the configuration is that of all processes together. The first process reports.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import cli, memory, overlay
from harness.errors import UsageError


def main(argv: list[str] | None = None) -> int:
    """Train, judge on the validation rows, print what came of it; exit codes as of `kata`."""
    parser = cli.Parser(prog="torchrun ... -m harness.distributed", description=__doc__)
    cli.impl(parser, "mine")
    cli.data(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        raise UsageError("start it by torchrun: docs/distributed.md says how")
    memory.keep()
    import torch
    import torch.distributed as dist

    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        overlay.install(overlay.resolve(args.impl or ["mine"], Path.cwd()))
        figures = train(args, device)
        if dist.get_rank() == 0:
            print(
                f"{figures['processes']} processes, {figures['examples']:,} examples in "
                f"{figures['seconds']:.1f} s ({figures['examples'] / figures['seconds']:,.0f} a "
                f"second), validation NDCG@10 {figures['ndcg@10']:.4f}"
            )
    finally:
        dist.destroy_process_group()
    return 0


def train(args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Fit on the training rows with all processes; figures of the run."""
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

    from harness.run import load_config
    from recsys import pipeline
    from recsys.data.load import load
    from recsys.data.splits import make_split
    from recsys.evaluation.metrics import list_metrics
    from recsys.training.distributed import distributed_softmax_loss, own_rows
    from recsys.training.loop import FitConfig, evaluate, fit

    dataset = load(args.data, seed=args.seed)
    _, config = load_config(args.config, dataset.name, args.set or [])
    settings = config["retrieval"]
    if settings["user_tower"] != "bag" or settings["loss"] != "in_batch":
        raise UsageError(
            "several processes share in-batch negatives: add "
            "--set retrieval.user_tower=bag --set retrieval.loss=in_batch"
        )
    split = make_split(dataset, config["split"], ties=config["ties"], seed=args.seed)
    data = pipeline.RetrievalData(dataset, split.train, settings, device)
    torch.manual_seed(args.seed)
    model = DistributedDataParallel(pipeline.build_retrieval(data, settings).to(device))
    torch.manual_seed(args.seed + dist.get_rank())  # or dropout would be the same everywhere

    def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        target = batch["target"]
        user, item = model(batch, data.item_batch(target))
        return distributed_softmax_loss(
            user,
            item,
            temperature=model.module.temperature,
            item_ids=target if settings["mask_accidental_hits"] else None,
            log_q=data.log_q[target] if settings["log_q"] else None,
        )

    result = fit(
        model,
        loss_fn,
        len(data.positions),
        lambda index: data.example_batch(own_rows(index)),
        FitConfig(**settings["fit"], seed=args.seed),
    )

    def ndcg(model: nn.Module) -> float:
        users = torch.from_numpy(dataset.user[split.validation]).to(device)
        target = torch.from_numpy(dataset.item[split.validation]).to(device)
        asked = pipeline.requests_after_all(dataset, data).of(users)
        items, scores = pipeline.retrieve(
            model, data, asked, k=10, chunk_size=settings["chunk_size"]
        )
        return list_metrics(items, scores, target)["ndcg@10"]

    return {
        "processes": dist.get_world_size(),
        "examples": result.examples,  # the loop counts global batches
        "seconds": result.seconds,
        "ndcg@10": evaluate(model.module, ndcg),
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"kata: {error}", file=sys.stderr)
        sys.exit(cli.USAGE)
