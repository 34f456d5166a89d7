"""Write the rows of the first intents of Banking77, in alphabetical order, for a comparison that two cores afford.

    python benchmarks/banking77_subset.py DIR OUT --intents 6

DIR holds train.csv and test.csv with the columns text and category, as PolyAI publishes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--intents", type=int, default=6)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        rows = pd.read_csv(options.source / f"{name}.csv")
        intents = sorted(rows["category"].unique())[: options.intents]
        rows = rows[rows["category"].isin(intents)]
        rows.to_csv(options.out / f"{name}.csv", index=False)
        print(f"{name}: {len(rows)} rows of {', '.join(intents)}")


if __name__ == "__main__":
    main()
