"""Print the returns of data sets' episodes: `python -m benchmarks.returns NAME ...`."""

import sys

import h5py
import numpy as np

from mopo_fast.data import find_dataset
from mopo_fast.tasks import get_task, parse_dataset_name


def main(names: list[str]) -> None:
    for given in names:
        path, _ = find_dataset(given)
        with h5py.File(path) as file:
            rewards = file["rewards"][()].astype(np.float64)
            ends = np.flatnonzero(file["terminals"][()] | file["timeouts"][()])
        # Rows after the last end belong to an episode that is not complete.
        sums = np.diff(np.concatenate([[0.0], rewards.cumsum()[ends]]))
        task = get_task(parse_dataset_name(path.stem)[0])
        line = f"{path.stem}: {len(rewards):,} transitions, {len(sums):,} episodes, return"
        for what, value in (("mean", sums.mean()), ("best", sums.max())):
            score = task.normalized_score(value)
            line += f", {what} {value:.1f}" + ("" if score is None else f" (score {score:.1f})")
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
