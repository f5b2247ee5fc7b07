"""`kata bench --ratings`: will a user like an item, beside means and a library's models.

Rating at least 4, the newest tenth of all ratings is the test. Two protocols, apart (recsys.data.
ratings): frozen, where nothing is learnt after the split, and online, where features follow what
has been seen. Every model has the same rows, loop and grid; a setting is chosen by the log loss of
the validation slice, the tenth before the test, and fitted again on both with several seeds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from harness import bench, run
from harness.errors import UsageError
from harness.paths import ROOT

CONFIG = "rating-prediction"
LIBRARY = "torch-rechub"
BINS = 10  # of the calibration error
ROUNDS = 1000  # of the bootstrap


# --- figures --------------------------------------------------------------------------------------


def auc(score: np.ndarray, label: np.ndarray, weight: np.ndarray | None = None) -> Any:
    """Probability that a positive scores above a negative, a tie counting half.

    Args:
        score, label: (n,). weight: (R, n) counts of each row in R resamples.

    Returns:
        A float, or (R,) with weights.
    """
    counts = np.ones((1, len(score))) if weight is None else weight
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    positive = np.add.reduceat((counts * label)[:, order], starts, axis=1)
    negative = np.add.reduceat((counts * (1 - label))[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    value = (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
    return float(value[0]) if weight is None else value


def log_losses(probability: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(n,) minus log likelihood of each label, in nats."""
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return -np.where(label > 0, np.log(p), np.log1p(-p))


def reliability(
    probability: np.ndarray, label: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, share of positives and rows in bins of equal width that are not empty."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    said = np.bincount(place, probability, bins)
    came = np.bincount(place, label, bins)
    full = count > 0
    return said[full] / count[full], came[full] / count[full], count[full]


def calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3)."""
    said, came, count = reliability(probability, label, bins)
    return float((np.abs(said - came) * count).sum() / count.sum())


def resamples(user: np.ndarray, rounds: int = ROUNDS, seed: int = 0) -> np.ndarray:
    """(rounds, n) how often each row is drawn when users are: ratings of one user go together."""
    users, place = np.unique(user, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(
        len(users), np.full(len(users), 1 / len(users)), size=rounds
    )
    return draws[:, place]


# --- who predicts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A model that is trained.

    build: (features, settings) to a module that gives logits. columns: which set it reads.
    """

    name: str
    build: Callable[[list[Any], Mapping[str, Any]], Any]
    columns: str
    package: str | None = None

    @property
    def version(self) -> str | None:
        """Of its package, "" if it is ours; None if that is not installed."""
        return bench.installed(self.package) if self.package else ""


def ours(cross: bool, deep: bool) -> Callable[[list[Any], Mapping[str, Any]], Any]:
    """The `RankingModel` of kata 04, with cross layers, a deep part, both or neither."""

    def build(features: list[Any], settings: Mapping[str, Any]) -> Any:
        from recsys.models.ranking import RankingModel

        return RankingModel(
            features,
            embedding_dim=settings["embedding_dim"],
            num_cross_layers=settings["num_cross_layers"] if cross else 0,
            hidden_dims=settings["hidden_dims"] if deep else (),
            dropout=settings["dropout"],
            structure="parallel" if cross or not deep else "stacked",
        )

    return build


def library(model: str) -> Callable[[list[Any], Mapping[str, Any]], Any]:
    """DCNv2 (full matrices, parallel) or DeepFM of torch-rechub, with our sizes."""

    def build(features: list[Any], settings: Mapping[str, Any]) -> Any:
        import torch
        from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
        from torch_rechub.models import ranking

        width, sparse, dense = settings["embedding_dim"], [], []
        for f in features:
            if f.kind == "id":
                sparse.append(SparseFeature(f.name, f.size, width))
            elif f.kind == "multi_hot":
                sparse.append(SequenceFeature(f.name, f.size, width, padding_idx=0))
            else:
                dense.append(DenseFeature(f.name, f.size))
        mlp = {"dims": list(settings["hidden_dims"]), "dropout": settings["dropout"]}
        if model == "DCNv2":
            inner = ranking.DCNv2(
                sparse + dense,
                settings["num_cross_layers"],
                mlp | {"activation": "relu"},
                use_low_rank_mixture=False,
            )
        else:
            inner = ranking.DeepFM(sparse + dense, sparse, mlp | {"activation": "relu"})

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, batch: Mapping[str, Any]) -> Any:
                return torch.logit(self.inner(batch), eps=1e-6)

        return Logits()

    return build


METHODS = (
    Method("means, logistic", ours(cross=False, deep=False), "means"),
    Method("linear", ours(cross=False, deep=False), "all"),
    Method("deep only", ours(cross=False, deep=True), "all"),
    Method("cross only", ours(cross=True, deep=False), "all"),
    Method("DCN", ours(cross=True, deep=True), "all"),
    Method(f"{LIBRARY} DCNv2", library("DCNv2"), "all", LIBRARY),
    Method(f"{LIBRARY} DeepFM", library("DeepFM"), "all", LIBRARY),
    Method(f"{LIBRARY} DCNv2, ids", library("DCNv2"), "ids", LIBRARY),
    Method(f"{LIBRARY} DeepFM, ids", library("DeepFM"), "ids", LIBRARY),
)
OURS, MEANS = "DCN", "shrunk means"


def make_columns(
    dataset: Any, table: Any, fitted: np.ndarray, text: Any, seed: int = 0
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What models may read: columns by name, (n,) or (n, size) tensors, and sets of features.

    The sets are "all", "means" and "ids".

    Numbers are scaled to mean 0 and deviation 1 over the rows at the places ``fitted``, which is
    what models are trained on. Users without any of these rows have the id 0, and so that its row
    is trained a tenth of the others, drawn at random, have it too.
    """
    import torch

    from recsys.data.features import Feature, item_features, user_features

    def scaled(values: np.ndarray) -> Any:
        mean, spread = values[fitted].mean(0), values[fitted].std(0)
        return torch.from_numpy((values - mean) / np.where(spread > 1e-6, spread, 1.0)).float()

    item, user = torch.from_numpy(table.item), torch.from_numpy(table.user)
    item_specs, items = item_features(dataset)
    user_specs, users = user_features(dataset)
    side = [f for f in item_specs if f.kind != "dense"] + user_specs
    values = {f.name: items[f.name][item] for f in item_specs}
    values |= {f.name: users[f.name][user] for f in user_specs}
    values["dense"] = scaled(table.features)
    names = [n for n in table.names if n.startswith(("means_", "item_", "user_"))]
    values["means"] = scaled(np.stack([table.column(n) for n in names], axis=1))
    known = np.isin(table.user, table.user[fitted])
    known &= np.random.default_rng(seed).random(len(table.user)) >= 0.1
    values["user_id"] = (user + 1) * torch.from_numpy(known)
    every = [Feature("dense", "dense", table.features.shape[1]), *side]
    if text is not None:
        values["text"] = text[item]
        every.append(Feature("text", "text", text.shape[1]))
    ids = [Feature("user_id", "id", dataset.num_users + 1), *item_specs, *user_specs]
    return values, {"all": every, "means": [Feature("means", "dense", len(names))], "ids": ids}


class Trial:
    """One protocol: its table, and models trained and judged on it."""

    def __init__(self, dataset: Any, split: Any, config: Mapping[str, Any], protocol: str, *,
                 text: Any, content: np.ndarray) -> None:
        from recsys.data.ratings import rating_table

        self.dataset, self.config, self.text, self.protocol = dataset, config, text, protocol
        self.table = table = rating_table(
            dataset,
            protocol=protocol,
            blocks=config["blocks"][protocol],
            threshold=config["threshold"],
            content=content,
            **config["features"],
        )
        train, self.validation, self.test = (
            table.places(rows) for rows in (split.train, split.validation, split.test)
        )
        self.train = train[train >= config["warm_up"] * len(table.rows)]
        blocks = [table.block[part] for part in (train, self.validation, self.test)]
        if np.intersect1d(blocks[2], np.concatenate(blocks[:2])).size:
            raise UsageError(
                f"blocks.{protocol}: {config['blocks'][protocol]} blocks do not start where the "
                "test does; expected a number of them that makes the test a whole number of blocks"
            )

    def means(self) -> np.ndarray:
        """(n,) probability from the shrunk means of item and user, prior tuned on validation."""
        from recsys.data.ratings import shrunk_means

        like = self.table.like
        tried: list[tuple[float, np.ndarray]] = []
        for item, user in itertools.product(self.config["means"]["prior"], repeat=2):
            guess = shrunk_means(
                self.dataset,
                protocol=self.protocol,
                blocks=self.config["blocks"][self.protocol],
                threshold=self.config["threshold"],
                item_prior=item,
                user_prior=user,
            )
            loss = log_losses(guess[self.validation], like[self.validation]).mean()
            tried.append((float(loss), guess))
        return min(tried, key=lambda each: each[0])[1]

    def predict(
        self, method: Method, settings: Mapping[str, Any], fitted: np.ndarray,
        asked: np.ndarray, seed: int,
    ) -> np.ndarray:
        """Train on the rows at places ``fitted``; probabilities of those ``asked``."""
        import torch

        from recsys.models.ranking import binary_loss
        from recsys.training.loop import FitConfig, fit

        values, sets = make_columns(self.dataset, self.table, fitted, self.text)
        features = sets[method.columns]
        values = {f.name: values[f.name] for f in features}
        place = torch.from_numpy(fitted)
        label = torch.from_numpy(self.table.like).float()

        def make_batch(index: Any) -> dict[str, Any]:
            rows = place[index]
            return {name: x[rows] for name, x in values.items()} | {"label": label[rows]}

        torch.manual_seed(seed)
        model = method.build(features, {**self.config["model"], **settings})
        options = {k: settings[k] for k in ("epochs", "lr", "weight_decay")}
        fit(
            model,
            lambda model, batch: binary_loss(model(batch), batch["label"]),
            len(fitted),
            make_batch,
            FitConfig(**self.config["fit"], **options, seed=seed),
        )
        rows = torch.from_numpy(asked)
        with torch.no_grad():
            logits = model.eval()({name: x[rows] for name, x in values.items()})
        return torch.sigmoid(logits.double()).numpy()

    def tune(self, method: Method) -> dict[str, Any]:
        """The setting of the grid with the least log loss on the validation slice."""
        names = list(self.config["grid"])
        best, least = {}, np.inf
        for values in itertools.product(*self.config["grid"].values()):
            settings = dict(zip(names, values, strict=True))
            guess = self.predict(method, settings, self.train, self.validation, seed=0)
            loss = log_losses(guess, self.table.like[self.validation]).mean()
            if loss < least:
                best, least = settings, loss
        return best

    def final(self, method: Method, settings: Mapping[str, Any], seeds: int) -> np.ndarray:
        """(seeds, test rows) probabilities, fitted on training and validation rows."""
        fitted = np.concatenate([self.train, self.validation])
        return np.stack(
            [self.predict(method, settings, fitted, self.test, seed) for seed in range(seeds)]
        )


def judge(label: np.ndarray, guesses: np.ndarray, best: np.ndarray, weight: np.ndarray) -> Any:
    """Figures of one method; its guesses and the best method's are (seeds, n).

    Returns:
        ``{"auc", "log_loss", "calibration_error": a value a seed, "behind": {"auc", "log_loss":
        (low, high)}}``: 95 % intervals, users resampled, of how far it is behind the best (what
        the best has more of AUC, and less of loss), means over seeds.
    """
    per_row = [np.mean([log_losses(g, label) for g in some], axis=0) for some in (guesses, best)]
    lost = weight @ (per_row[0] - per_row[1]) / weight.sum(1)
    area = [np.mean([auc(g, label, weight) for g in some], axis=0) for some in (guesses, best)]
    return {
        "auc": [auc(g, label) for g in guesses],
        "log_loss": [float(log_losses(g, label).mean()) for g in guesses],
        "calibration_error": [calibration_error(g, label) for g in guesses],
        "behind": {
            "auc": np.quantile(area[1] - area[0], [0.025, 0.975]).tolist(),
            "log_loss": np.quantile(lost, [0.025, 0.975]).tolist(),
        },
    }


# --- the command ----------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """Tune, train, judge; print the record, and write it with its plot where `--out` says."""
    impl = args.impl or ["mine"]
    dataset = bench.load(args)
    _, config = run.load_config(args.config or CONFIG, CONFIG, args.set or [])
    folder = ROOT / "runs" / f"{datetime.now():%Y%m%d-%H%M%S}-ratings"
    out = Path(args.out or folder / f"{CONFIG}.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    results, plots, encoder = measure(dataset, config, args.seeds)
    seconds = time.perf_counter() - began
    plot(plots, out.with_suffix(".png"))
    text = record(args, impl, dataset, results, encoder, seconds, out.with_suffix(".png").name)
    out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def measure(
    dataset: Any, config: dict[str, Any], seeds: int
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Figures of every method under both protocols, what the plot needs, and the text encoder."""
    import torch

    from recsys.data.features import content_vectors
    from recsys.data.splits import global_time
    from recsys.pipeline import reduced, text_vectors

    encoder = run.use_encoder(config)
    text = text_vectors(dataset, config["text"], torch.device("cpu"))
    if text is not None:
        text = reduced(text, config["text"]["dim"])
    content = content_vectors(dataset, None if text is None else text.numpy())
    split = global_time(dataset, **config["split"])
    results, plots = {}, {}
    for protocol in ("frozen", "online"):
        bench.say(f"{protocol}: features")
        trial = Trial(dataset, split, config, protocol, text=text, content=content)
        label = trial.table.like[trial.test]
        guesses = {MEANS: trial.means()[None, trial.test]}
        chosen: dict[str, Any] = {MEANS: {}}
        for method in METHODS:
            if method.version is None or (method.columns == "ids" and protocol == "online"):
                continue
            bench.say(f"{protocol}: {method.name}")
            chosen[method.name] = trial.tune(method)
            guesses[method.name] = trial.final(method, chosen[method.name], seeds)
        weight = resamples(trial.table.user[trial.test])
        results[protocol] = {
            "rows": len(label),
            "new_users": float(
                1 - np.isin(trial.table.user[trial.test], trial.table.user[: trial.test[0]]).mean()
            ),
            "methods": {
                name: judge(label, guess, guesses[OURS], weight) | {"settings": chosen[name]}
                for name, guess in guesses.items()
            },
        }
        plots[protocol] = (label, {name: guesses[name] for name in (MEANS, OURS)})
    return results, plots, encoder or "none"


def plot(plots: dict[str, Any], path: Path) -> None:
    """Said against came for each protocol, bins of equal width; below, how often it was said."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(plots), figsize=(9, 5.5), height_ratios=[3, 1], sharex=True, layout="constrained"
    )
    for (upper, lower), (protocol, (label, methods)) in zip(axes.T, plots.items(), strict=True):
        upper.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for color, (name, guesses) in zip(("C7", "C0"), methods.items(), strict=True):
            every, labels = guesses.ravel(), np.tile(label, len(guesses))
            said, came, count = reliability(every, labels)
            upper.plot(said, came, marker="o", markersize=4, color=color, label=name)
            lower.plot(said, count / count.sum(), drawstyle="steps-mid", color=color)
        upper.set_title(protocol)
        upper.legend()
        lower.set_xlabel("probability said")
    axes[0, 0].set_ylabel("share liked")
    axes[1, 0].set_ylabel("share of rows")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def record(
    args: argparse.Namespace, impl: list[str], dataset: Any, results: dict[str, Any],
    encoder: str, seconds: float, picture: str,
) -> str:
    """The record in Markdown."""
    import torch

    versions = run.versions()
    peers = sorted({f"{m.package} {m.version}" for m in METHODS if m.package and m.version})
    missing = sorted({m.package for m in METHODS if m.package and m.version is None})
    lines = [
        "# Rating prediction",
        "",
        f"Written by `{command(args)}` on {datetime.now():%Y-%m-%d}: {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s), Python "
        f"{versions['python']}, torch {versions['torch']}, "
        f"{', '.join(peers) or 'no library installed'}, commit {versions['commit']}, "
        f"`--impl {' '.join(impl)}`, {seconds:.0f} s. Text: {encoder}.",
        *([f"\nNot installed, so not measured: {', '.join(missing)}."] if missing else []),
        "",
    ]
    for protocol, result in results.items():
        lines += [
            f"## {dataset.name}, {protocol}",
            "",
            f"{result['rows']:,} test rows, {result['new_users']:.0%} of them of users without any "
            f"rating before the split. {args.seeds} seeds: mean (lowest to highest).",
            "",
            "| | AUC | log loss | calibration error | AUC of DCN is higher by, 95 % | log loss of "
            "DCN is lower by, 95 % |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in result["methods"].items():
            cells = [spread(row[key]) for key in ("auc", "log_loss", "calibration_error")]
            for key in ("auc", "log_loss"):
                low, high = row["behind"][key]
                cells.append("" if name == OURS else f"{low:+.4f} to {high:+.4f}")
            lines.append(f"| {' | '.join([name, *cells])} |")
        settings = (f"{n}: {compact(r['settings'])}" for n, r in result["methods"].items()
                    if r["settings"])
        lines += ["", f"Chosen on validation. {'; '.join(settings)}.", ""]
    return "\n".join([*lines, f"![reliability]({picture})", ""])


def command(args: argparse.Namespace) -> str:
    """What was typed, with the data's name for its path."""
    parts = ["kata bench --ratings", "--data", Path(args.data).name, f"--seeds {args.seeds}"]
    parts += [f"--impl {impl}" for impl in args.impl or []]
    parts += [f"--config {args.config}"] if args.config else []
    return " ".join([*parts, *(f"--set {item}" for item in args.set or [])])


def spread(values: list[float]) -> str:
    """Mean (lowest to highest); the mean alone if all are the same."""
    low, high = min(values), max(values)
    middle = f"{sum(values) / len(values):.4f}"
    return middle if low == high else f"{middle} ({low:.4f} to {high:.4f})"


def compact(settings: Mapping[str, Any]) -> str:
    """Settings in a table's cell."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())
