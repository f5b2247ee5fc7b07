"""What a run leaves behind: report.json, report.md with plots, the raw lists, a table to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLE_USERS = 3
EXAMPLE_ITEMS = 5


def examples(dataset: Any, split: Any, items: np.ndarray) -> list[dict[str, Any]]:
    """What some users watched last, what is recommended to them, and what they did watch next.

    The users are spread evenly over those with a test item, so that they are the same each time.
    """
    last = np.concatenate([split.train, split.validation])
    chosen = np.linspace(0, len(split.test) - 1, EXAMPLE_USERS + 2).astype(int)[1:-1]
    result = []
    for row in split.test[chosen]:
        user = dataset.user[row]
        history = last[dataset.user[last] == user]
        recent = history[np.argsort(dataset.time[history], kind="stable")][::-1][:EXAMPLE_ITEMS]
        result.append(
            {
                "user": _plain(dataset.user_ids[user]),
                "watched": [title(dataset, i) for i in dataset.item[recent]],
                "recommended": [title(dataset, i) for i in items[user][:EXAMPLE_ITEMS] if i >= 0],
                "next": title(dataset, dataset.item[row]),
            }
        )
    return result


def title(dataset: Any, item: int) -> str:
    """The title of an item, or its id where the data have none."""
    return dataset.titles[item] or f"item {dataset.item_ids[item]}"


def write(
    result: dict[str, Any], outcome: dict[str, Any], example: list[dict[str, Any]], out: Path
) -> None:
    """Write all files of a run into `out`."""
    retrieval, final = outcome["retrieval"], outcome["final"]
    np.savez_compressed(
        out / "lists.npz",
        retrieval_items=retrieval["items"].astype(np.int32),
        retrieval_scores=retrieval["scores"].astype(np.float32),
        ranking_logits=outcome["ranking"]["logits"].astype(np.float32),
        final_items=final["items"].astype(np.int32),
        final_scores=final["scores"].astype(np.float32),
    )
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    plot_training(retrieval, out / "training.png")
    plot_quality(result, out / "quality.png")
    (out / "report.md").write_text(markdown(result, example), encoding="utf-8")


def plot_training(retrieval: dict[str, Any], path: Path) -> None:
    """Training loss, and the validation metric where one was measured, over epochs."""
    figure, axis = _figure()
    epochs = np.arange(1, len(retrieval["losses"]) + 1)
    axis.plot(epochs, retrieval["losses"], color="C0")
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss", color="C0")
    axis.set_title("Training of the retrieval model")
    if retrieval["metrics"]:
        right = axis.twinx()
        epochs = np.arange(1, len(retrieval["metrics"]) + 1)
        right.plot(epochs, retrieval["metrics"], color="C1")
        right.set_ylabel("validation NDCG@10", color="C1")
        right.set_ylim(bottom=0)
    figure.savefig(path)


def plot_quality(result: dict[str, Any], path: Path) -> None:
    """NDCG@10 and hit rate of the stages beside the popularity baseline."""
    figure, axis = _figure()
    stages = {
        "popularity": result["baselines"]["popularity"],
        "retrieval": result["retrieval"],
        "final": result["final"],
    }
    width = 0.38
    for shift, metric in ((-width / 2, "ndcg@10"), (width / 2, "hit_rate@10")):
        places = np.arange(len(stages)) + shift
        bars = axis.bar(places, [s[metric] for s in stages.values()], width, label=metric)
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
    axis.set_xticks(range(len(stages)), list(stages))
    axis.set_title(f"Test users of {result['data']['name']}, whole catalogue ranked")
    axis.legend()
    figure.savefig(path)


def markdown(result: dict[str, Any], example: list[dict[str, Any]]) -> str:
    """The report for reading: figures, where they come from, plots, recommendations."""
    data, retrieval = result["data"], result["retrieval"]
    popularity, final = result["baselines"]["popularity"], result["final"]
    ranking = result["ranking"]
    lines = [
        f"# Run on {data['name']}",
        "",
        f"{result['date']}, seed {result['seed']}, {result['device']}, "
        f"{result['seconds']:.0f} s, `--impl {result['impl']}`, {result['config']['file']}",
        "",
        f"{data['users']:,} users, {data['items']:,} items, {data['interactions']:,} interactions; "
        f"split {data['split']}, ties {data['ties']}. {retrieval['users']:,} test users, the whole "
        "catalogue ranked for each, items already seen left out.",
        *(f"\nNote: {note}" for note in data["notes"]),
        "",
        "| stage | NDCG@10 | HR@10 | MRR@10 | recall@100 |",
        "| --- | --- | --- | --- | --- |",
        f"| popularity | {popularity['ndcg@10']:.4f} | {popularity['hit_rate@10']:.4f} | | |",
        f"| retrieval | {retrieval['ndcg@10']:.4f} | {retrieval['hit_rate@10']:.4f} "
        f"| {retrieval['mrr@10']:.4f} | {retrieval['recall@100']:.4f} |",
        f"| final (ranked) | {final['ndcg@10']:.4f} | {final['hit_rate@10']:.4f} "
        f"| {final['mrr@10']:.4f} | |",
        "",
        "95 % intervals over users:",
        "",
        f"- retrieval NDCG@10 {_interval(retrieval, 'ndcg@10_interval')}, paired gain over "
        f"popularity {_interval(retrieval, 'gain_over_popularity_interval')};",
        f"- final NDCG@10 {_interval(final, 'ndcg@10_interval')}, paired gain over retrieval "
        f"{_interval(final, 'gain_over_retrieval_interval')}.",
        "",
        f"The ranker, on the {ranking['lists']:,} lists that hold the item chosen next: AUC "
        f"{ranking['auc']:.3f} within lists, log loss {ranking['logloss']:.4f}, normalised entropy "
        f"{ranking['normalized_entropy']:.3f}. With its scores shuffled within each list NDCG@10 "
        f"would be {ranking['shuffled_ndcg@10']:.4f}.",
        "",
        f"Training: {retrieval['epochs']} epochs in {retrieval['train_seconds']:.1f} s, "
        f"{retrieval['train_examples_per_second']:,.0f} examples a second, "
        f"peak memory {retrieval['peak_memory_mb'] or float('nan'):,.0f} MB.",
        "",
        f"{result['cpu_seconds']:.0f} s of CPU time; where the {result['seconds']:.0f} s went:",
        "",
        "| phase | seconds |",
        "| --- | ---: |",
        *(f"| {phase['name']} | {phase['seconds']:.1f} |" for phase in result["phases"]),
        "",
        "![quality](quality.png)",
        "",
        "![training](training.png)",
        "",
        *cold_start(result["cold_start"]),
        "## Recommendations",
        "",
    ]
    for person in example:
        lines += [
            f"**User {person['user']}** last watched {'; '.join(person['watched'])}.",
            "",
            *(f"{n}. {film}" for n, film in enumerate(person["recommended"], start=1)),
            "",
            f"Watched next: {person['next']}.",
            "",
        ]
    lines += ["## Not measured", ""]
    lines += [
        f"- {section}: {values['reason']}"
        for section, values in result.items()
        if isinstance(values, dict) and "reason" in values
    ]
    lines += ["", "## Whose code ran", ""]
    lines += [f"- `{file}`: {whose}" for file, whose in result["parts"].items()]
    return "\n".join(lines) + "\n"


def cold_start(figures: dict[str, Any]) -> list[str]:
    """The paragraph on items without ratings, if they were measured."""
    if figures["recall@10"] is None:
        return []
    floors = figures["floors"]
    return [
        "## Cold start",
        "",
        f"{figures['items']:,} items lost all their ratings and are recommended from text and "
        f"genres alone ({figures['encoder']}), ranked among each other for "
        f"{figures['users']:,} users: "
        f"recall@10 {figures['recall@10']:.4f}; likeness of texts {floors['content']:.4f}, chance "
        f"{floors['random']:.4f}. 95 % interval of the paired gain over likeness "
        f"{_interval(figures, 'gain_over_content_interval')}.",
        "",
    ]


def show(result: dict[str, Any], out: Path) -> None:
    """The short table at the end of a run, and what to do next."""
    data, retrieval = result["data"], result["retrieval"]
    popularity = result["baselines"]["popularity"]
    print(f"\n{data['name']}: {data['users']:,} users, {data['items']:,} items, "
          f"{data['interactions']:,} interactions, {data['split']}\n")  # fmt: skip
    print(f"{'':12}{'NDCG@10':>9}{'HR@10':>9}{'recall@100':>12}")
    print(f"{'popularity':12}{popularity['ndcg@10']:9.4f}{popularity['hit_rate@10']:9.4f}")
    print(
        f"{'retrieval':12}{retrieval['ndcg@10']:9.4f}{retrieval['hit_rate@10']:9.4f}"
        f"{retrieval['recall@100']:12.4f}"
    )
    final = result["final"]
    print(f"{'final':12}{final['ndcg@10']:9.4f}{final['hit_rate@10']:9.4f}\n")
    cold = result["cold_start"]
    if cold["recall@10"] is not None:
        print(
            f"New items, from text and genres: recall@10 {cold['recall@10']:.3f} "
            f"(by chance {cold['floors']['random']:.3f})\n"
        )
    for person in result["examples"]:
        print(f"User {person['user']} watched {_short('; '.join(person['watched'][:2]), 52)}")
        for film in person["recommended"][:3]:
            print(f"    recommended: {_short(film, 60)}")
    yours = [file for file, whose in result["parts"].items() if whose == "yours"]
    total = len(result["parts"])
    print(f"\nYours: {len(yours)} of {total} parts{': ' if yours else ''}{', '.join(yours)}")
    where = out.resolve() / "report.md"
    here = Path.cwd()
    where = where.relative_to(here) if where.is_relative_to(here) else where
    print(f"{result['seconds']:.0f} s. Report: {where}")
    print("Next: `./kata` shows the board and where to begin.")


def _interval(section: dict[str, Any], key: str) -> str:
    low, high = section[key]
    return f"{low:.4f} to {high:.4f}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), dpi=120, layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis
