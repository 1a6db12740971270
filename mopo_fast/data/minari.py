"""Minari's data sets, `minari:ID`, by way of its own package (`pip install 'mopo_fast[minari]'`)."""

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from mopo_fast.atomic import sync_folder
from mopo_fast.errors import InputError

Array = npt.NDArray[Any]

PREFIX = "minari:"


def read(name: str) -> dict[str, Any]:
    """D4RL's arrays of the data set `minari:ID`, on this machine or fetched to it, its metadata among them.

    Actions are scaled from the range of its action space, where that is bounded, to [-1, 1].

    Raises:
        InputError: the package or the data set is not there, or observations or actions are not vectors.
    """
    minari = _package()
    try:
        dataset = minari.load_dataset(name.removeprefix(PREFIX), download=True)
        stored = dataset.storage.metadata
        episodes = list(dataset.iterate_episodes())
    # Whatever its storages and hosts raise.
    except Exception as error:
        raise InputError(
            f"{name} cannot be loaded ({error}); see `minari list local` and `minari list remote`"
        ) from error
    for what, space in ("observations", dataset.observation_space), ("actions", dataset.action_space):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"{name}: {what} must be vectors, got {space}")
    if not episodes:
        raise InputError(f"{name} has no episodes")

    def joined(part: Any) -> Array:
        return np.concatenate([np.asarray(part(episode)) for episode in episodes])

    low, high = dataset.action_space.low, dataset.action_space.high
    actions = joined(lambda episode: episode.actions)
    if np.isfinite([low, high]).all() and not (np.all(low == -1) and np.all(high == 1)):
        actions = 2.0 * (actions - low.astype(np.float64)) / (high - low) - 1.0
    terminals = joined(lambda episode: episode.terminations)
    last = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    timeouts = joined(lambda episode: episode.truncations)
    # An episode of which no end is known was cut off.
    timeouts[last] = ~terminals[last]
    known = {key: value for key, value in stored.items() if isinstance(value, (str, int, float))}
    metadata = known | json.loads(stored.get("mopo_fast", "{}"))
    return {
        "observations": joined(lambda episode: episode.observations[:-1]),
        "actions": actions,
        "rewards": joined(lambda episode: episode.rewards),
        "next_observations": joined(lambda episode: episode.observations[1:]),
        "terminals": terminals,
        "timeouts": timeouts & ~terminals,
        **{f"metadata/{key}": value for key, value in metadata.items() if key != "mopo_fast"},
    }


def write(
    name: str, arrays: Mapping[str, Array], metadata: Mapping[str, str | float], *, overwrite: bool = False
) -> None:
    """Write transitions as the data set `minari:ID`, whole or not at all.

    An episode ends where a flag says so, and where the next row is not its successor.

    Args:
        arrays: observations, actions, rewards, next_observations, terminals, timeouts, in that layout.

    Raises:
        InputError: the package is not there, no such name is possible, it exists without `overwrite`, or the
            folder cannot be written.
    """
    minari = _package()
    identity = name.removeprefix(PREFIX)
    folder = path(name)
    check(name, overwrite)
    observations, successors = arrays["observations"], arrays["next_observations"]
    ended = arrays["terminals"] | arrays["timeouts"]
    ended[:-1] |= (successors[:-1] != observations[1:]).any(axis=1)
    ended[-1] = True
    episodes: list[Any] = []
    first = 0
    for last in np.flatnonzero(ended).tolist():
        rows = slice(first, last + 1)
        truncations = np.zeros(last + 1 - first, bool)
        truncations[-1] = not arrays["terminals"][last]
        episodes.append(
            minari.data_collector.EpisodeBuffer(
                id=len(episodes),
                observations=np.concatenate([observations[rows], successors[last : last + 1]]),
                actions=arrays["actions"][rows],
                rewards=arrays["rewards"][rows],
                terminations=arrays["terminals"][rows],
                truncations=truncations,
            )
        )
        first = last + 1
    root, before = path(PREFIX), os.environ.get("MINARI_DATASETS_PATH")
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as scratch:
            # Minari writes where this points to, step by step.
            os.environ["MINARI_DATASETS_PATH"] = scratch
            with warnings.catch_warnings():
                # It misses authors, links and environments, which these data need not have.
                warnings.simplefilter("ignore", UserWarning)
                dataset = minari.create_dataset_from_buffers(
                    identity,
                    episodes,
                    observation_space=_space(observations, np.inf),
                    action_space=_space(arrays["actions"], 1.0),
                    data_format="hdf5",
                )
            dataset.storage.update_metadata({"mopo_fast": json.dumps(dict(metadata))})
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                os.replace(folder, Path(scratch, "old"))
            os.replace(Path(scratch, identity), folder)
            sync_folder(folder.parent)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {name} ({error})") from error
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


def check(name: str, overwrite: bool) -> None:
    """Raise `InputError` where `write` would find the data set there."""
    if path(name).exists() and not overwrite:
        raise InputError(f"{name} exists already; choose another ID, or replace it with --overwrite")


def path(name: str) -> Path:
    """The folder of `minari:ID`, which may not be there."""
    found: Path = _package().storage.get_dataset_path(name.removeprefix(PREFIX))
    return found


def _space(array: Array, bound: float) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(-bound, bound, array.shape[1:], np.float32)


def _package() -> Any:
    try:
        return importlib.import_module("minari")
    except ImportError as error:
        raise InputError(
            f"minari cannot be imported ({error}); install it by `pip install 'mopo_fast[minari]'`"
        ) from error
