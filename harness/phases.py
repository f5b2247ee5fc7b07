"""Where the seconds of a run go: phases, each without what another phase within it takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

PARTS = {  # of the pipeline, by the names that kata 10 fixes
    "text vectors": ["text_vectors"],
    "columns": ["RetrievalData.__init__"],
    "train retrieval": ["train_retrieval"],
    "retrieve candidates": ["retrieve"],
    "candidate features": ["CandidateFeatures.__init__", "RankingData.__init__"],
    "train ranker": ["train_ranker"],
    "rank": ["Ranker.__call__"],
    "index": ["build_recommender"],
    "compile": ["measure_compile"],
}


class Phases:
    """Adds up wall time by phase.

    >>> phases = Phases()
    >>> with phases("load"):
    ...     with phases("download"):
    ...         pass
    >>> list(phases.seconds)
    ['download', 'load']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = [0.0]  # what the phases inside the open ones have taken
        self._whole = False

    @contextmanager
    def __call__(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """A phase; with `whole`, those within it are part of it."""
        if self._whole:
            yield
            return
        begin = time.perf_counter()
        self._whole = whole
        self._within.append(0.0)
        try:
            yield
        finally:
            taken = time.perf_counter() - begin
            self._whole = False
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._within.pop()
            self._within[-1] += taken

    @contextmanager
    def of(self, pipeline: Any) -> Iterator[None]:
        """Time the parts of the pipeline; one that it does not have is no phase."""
        with ExitStack() as stack:
            for phase, names in PARTS.items():
                for name in names:
                    owner, _, attribute = name.rpartition(".")
                    holder = getattr(pipeline, owner, None) if owner else pipeline
                    function = getattr(holder, attribute, None)
                    if holder is not None and callable(function):
                        timed = self._timed(phase, function)
                        stack.enter_context(mock.patch.object(holder, attribute, timed))
            yield

    def _timed(self, phase: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        return timed

    def report(self, total: float) -> list[dict[str, Any]]:
        """Rows for report.json, `{"name", "seconds"}`, with the rest of `total` seconds."""
        rest = total - sum(self.seconds.values())
        rows = {**self.seconds, "the rest": rest}
        return [{"name": name, "seconds": round(value, 2)} for name, value in rows.items()]
