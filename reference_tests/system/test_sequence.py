"""The pipeline with the sequence tower of kata 11, chosen by configuration."""

import json
import os
import subprocess
import sys

import pytest

from harness.paths import ROOT

CODE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from harness import overlay
from harness.run import load_config
overlay.install(overlay.resolve(["reference"], Path.cwd()))
from recsys import pipeline
from recsys.data.load import load
from recsys.data.splits import make_split
from recsys.evaluation.metrics import list_metrics

cpu = torch.device("cpu")
_, config = load_config(None, "synthetic", sys.argv[1:])
settings = config["retrieval"]
dataset = load("synthetic", seed=0)
split = make_split(dataset, "leave_last_one_out", ties="row", seed=0)
data = pipeline.RetrievalData(dataset, split.train, settings, cpu)
model, result = pipeline.train_retrieval(data, settings, seed=0, device=cpu)
asked = pipeline.requests_after_all(dataset, data).of(
    torch.from_numpy(dataset.user[split.validation])
)
found = pipeline.retrieve(model, data, asked, k=10, chunk_size=512)
target = torch.from_numpy(dataset.item[split.validation])
batch = data.example_batch(torch.arange(3))
print(json.dumps({
    "model": type(model).__name__,
    "shared": any(p is q for p in model.user_tower.parameters()
                  for q in model.item_tower.parameters()),
    "ndcg": list_metrics(*found, target)["ndcg@10"],
    "losses": result.losses,
    "steps": result.steps,
    "examples": len(data.positions),
    "shapes": {name: list(column.shape) for name, column in batch.items()},
}))
"""


@pytest.mark.parametrize("sampled", [0, 128])
def test_the_sequence_tower_by_configuration(sampled):
    """Windows of targets, batches as large in targets, one table, and it learns in five epochs."""
    options = ["user_tower=attention", f"attention.sampled={sampled}", "fit.epochs=5"]
    run = subprocess.run(
        [sys.executable, "-c", CODE, *(f"retrieval.{option}" for option in options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["model"] == "SequenceModel" and found["shared"]
    assert found["shapes"] == {"history": [3, 20], "target": [3, 20]}
    assert found["steps"] == 5 * (found["examples"] // (1024 // 20))
    assert found["losses"] == sorted(found["losses"], reverse=True)
    assert found["ndcg"] > 0.05, "popularity is at 0.03"
