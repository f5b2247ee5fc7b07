"""`python -m harness.serve`: train the pipeline once, then serve it until told to stop.

What the Dockerfile runs. The trained recommender is loaded as the service starts, and again, that
is trained again, by `POST /reload`; the service is reached when its warm-up is done. With `--log`
each request leaves a line for `python -m harness.monitor`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from harness import monitor, overlay, run
from harness.paths import ROOT, STATE
from harness.progress import Reporter


def main(argv: list[str] | None = None) -> int:
    """Serve; 0 after a graceful shutdown."""
    args = parser().parse_args(argv)
    overlay.install(overlay.resolve(args.impl or ["mine"], Path.cwd()))
    import torch
    import uvicorn

    from recsys.inference.serving import create_app

    torch.set_num_threads(1)  # requests are small: threads would only wait for each other
    seen: dict[int, int] = {}

    def loaded() -> Any:
        made = recommender(args.data, args.set or [])
        counts = made.seen[1][1:] - made.seen[1][:-1]
        seen.update(zip(made.user_ids.tolist(), counts.tolist(), strict=True))
        return made

    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(args.log, "a", encoding="utf-8")) if args.log else None
        app = monitor.RequestLog(create_app(loaded), log, seen.get)
        uvicorn.run(
            app, host=args.host, port=args.port, access_log=False, timeout_graceful_shutdown=30
        )
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m harness.serve", description=__doc__)
    made.add_argument("--data", default="synthetic", help="as for `kata run`")
    made.add_argument("--impl", action="append", metavar="IMPL", help="as for `kata run`")
    made.add_argument("--set", action="append", metavar="KEY=VALUE", help="of the configuration")
    made.add_argument("--host", default="127.0.0.1", help="0.0.0.0 in a container")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--log", metavar="FILE", help="a line for each request, for the monitor")
    return made


def recommender(data: str, overrides: list[str]) -> Any:
    """Train on `data`, test rows included for nothing but what a user has seen."""
    from recsys.data.load import load
    from recsys.data.splits import make_split
    from recsys.pipeline import run as train

    with Reporter(STATE / "serve") as reporter:
        dataset = load(data, seed=0, progress=reporter.download)
        _, config = run.load_config(None, dataset.name, ["compile.measure=false", *overrides])
        run.use_encoder(config)
        split = make_split(dataset, config["split"], ties=config["ties"], seed=0)
        device = run.resolve_device("cpu")
        return train(dataset, split, config, seed=0, device=device, log=reporter.log)["recommender"]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
