"""Outcomes: a method's results on each test row, read from the files that its study left.

Shapes: S seeds, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from rankloom.comparison.statistics import Matrix
from rankloom.errors import TrialError
from rankloom.registry.scorecard import Measures

Measure = Literal["metric", "accuracy", "exact_match", "loss"]


@dataclass(frozen=True)
class Outcomes:
    """The results of one method's seeds on the same rows."""

    tables: tuple[pa.Table, ...]
    """A table for each seed: `search.score_finalists.write_rows` says what of."""

    @classmethod
    def read(cls, files: Sequence[Path]) -> Outcomes:
        """Read one file for each seed.

        Raises:
            TrialError: a file is missing, or has other rows than the first.
        """
        try:
            tables = tuple(parquet.read_table(file) for file in files)
        except (OSError, pa.ArrowInvalid) as error:
            raise TrialError(f"the results on the test rows can't be read: {error}; run the comparison again") from None
        for file, table in zip(files, tables, strict=True):
            if table.column("reference") != tables[0].column("reference") or len(table) != len(tables[0]):
                raise TrialError(f"{file} is of other test rows than {files[0]}; run the comparison again")
        return cls(tables)

    @property
    def num_rows(self) -> int:
        return len(self.tables[0])

    @property
    def references(self) -> list[str]:
        """The rows' labels or completions."""
        found: list[str] = self.tables[0].column("reference").to_pylist()
        return found

    @property
    def predictions(self) -> list[list[str]]:
        """For each seed, what was predicted for each row."""
        return [table.column("prediction").to_pylist() for table in self.tables]

    def get_values(self, measure: Measure) -> Matrix:
        """Return the measure's value [S, N] of each row, whose mean is the measure's on all rows.

        A row's loss counts by the number of its trained tokens, since the mean is over tokens.
        """
        if measure == "metric":
            return np.array([table.column("metric").to_pylist() for table in self.tables], dtype=float)
        if measure == "loss":
            losses_SN = np.array([table.column("loss").to_pylist() for table in self.tables], dtype=float)
            weights_N = np.array(self.tables[0].column("weight").to_pylist(), dtype=float)
            return losses_SN * (weights_N / weights_N.mean())
        return np.array(
            [[p == r for p, r in zip(each, self.references, strict=True)] for each in self.predictions], dtype=float
        )

    def select(self, places: Sequence[int]) -> Outcomes:
        """Return the outcomes of some of the seeds."""
        return Outcomes(tuple(self.tables[place] for place in places))

    @property
    def has_row_metric(self) -> bool:
        """Whether the user's own metric gave a value for each row."""
        return all(table.column("metric").null_count == 0 for table in self.tables)


def choose_measure(measures: Measures, outcomes: Mapping[str, Outcomes]) -> Measure:
    """Return what to compare methods by: the first of these that there is a value of for each row.

    The user's own metric, accuracy, exact match, loss.

    Args:
        measures: of any scored trial.
    """
    if measures.metric is not None and all(each.has_row_metric for each in outcomes.values()):
        return "metric"
    if measures.accuracy is not None:
        return "accuracy"
    return "exact_match" if measures.exact_match is not None else "loss"
