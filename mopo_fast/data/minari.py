"""Minari's data sets, `minari:ID`, by way of its own package (`pip install 'mopo_fast[minari]'`)."""

import importlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from mopo_fast.data.hdf5 import open_hdf5
from mopo_fast.data.stored import check_fits, reading
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import read_json_as, replace_folder, scratch_folder

Array = npt.NDArray[Any]

PREFIX = "minari:"

# An episode has eight and more; there are sets of some ten thousand episodes.
_MOST_OBJECTS = 10_000_000


def read(name: str) -> dict[str, Any]:
    """D4RL's arrays of the data set `minari:ID`, on this machine or fetched to it, its metadata among them.

    Actions are scaled from the range of its action space, where that is bounded, to [-1, 1].

    Raises:
        InputError: the package or the data set is not there, or observations or actions are not vectors.
    """
    minari, identity, folder = _package(), name.removeprefix(PREFIX), path(name) / "data"
    try:
        if not folder.exists():
            minari.download_dataset(identity)
        _check_files(folder)
        dataset = minari.load_dataset(identity)
        stored = dataset.storage.metadata
        episodes = list(dataset.iterate_episodes())
    except InputError:
        raise
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
    for number, episode in enumerate(episodes):
        _check_episode(f"episode {number} of {name}", episode, dataset)

    def joined(part: Any) -> Array:
        return np.concatenate([np.asarray(part(episode)) for episode in episodes])

    low, high = dataset.action_space.low, dataset.action_space.high
    actions = joined(lambda episode: episode.actions)
    if np.isfinite([low, high]).all() and not (np.all(low == -1) and np.all(high == 1)):
        # An empty range makes the actions not finite, and the check of the actions tells so.
        with np.errstate(all="ignore"):
            actions = 2.0 * (actions - low.astype(np.float64)) / (high - low) - 1.0
    terminals = joined(lambda episode: episode.terminations)
    last = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    timeouts = joined(lambda episode: episode.truncations)
    # An episode of which no end is known was cut off.
    timeouts[last] = ~terminals[last]
    metadata = _texts_and_numbers(stored)
    with reading(folder / "metadata.json", "JSON"):
        metadata |= _texts_and_numbers(json.loads(metadata.get("mopo_fast", "{}")))
    return {
        "observations": joined(lambda episode: episode.observations[:-1]),
        "actions": actions,
        "rewards": joined(lambda episode: episode.rewards),
        "next_observations": joined(lambda episode: episode.observations[1:]),
        "terminals": terminals,
        "timeouts": timeouts & ~terminals,
        **{f"metadata/{key}": value for key, value in metadata.items() if key != "mopo_fast"},
    }


@dataclass(frozen=True)
class _Metadata:
    """The part of metadata.json that Minari uses; anything else is ignored."""

    data_format: str
    total_episodes: int
    total_steps: int
    observation_space: str | None = None
    action_space: str | None = None
    mopo_fast: str = "{}"


def _check_files(folder: Path) -> None:
    """Raise `InputError` where Minari is not to read what it has stored in a folder."""
    metadata = read_json_as(folder / "metadata.json", _Metadata)
    if metadata.data_format == "hdf5":
        with open_hdf5(folder / "main_data.hdf5", _MOST_OBJECTS) as file:
            # Once as episodes, once joined.
            check_fits(folder, 2 * sum(item.nbytes for item in file.values()), "")


def _check_episode(what: str, episode: Any, dataset: Any) -> None:
    steps = np.size(episode.rewards)
    if steps == 0:
        raise InputError(f"{what} has no steps")
    for part, shape, kinds in (
        ("observations", (steps + 1, *dataset.observation_space.shape), "fiu"),
        ("actions", (steps, *dataset.action_space.shape), "fiu"),
        ("rewards", (steps,), "fiu"),
        ("terminations", (steps,), "b"),
        ("truncations", (steps,), "b"),
    ):
        array = getattr(episode, part)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.shape != shape:
            takes = "flags" if kinds == "b" else "numbers"
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise InputError(f"{part} of {what} must be {takes} of shape {shape}, got {got}")


def _texts_and_numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if isinstance(value, (str, int, float))}


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
        minari.dataset.minari_dataset.parse_dataset_id(identity)
        root.mkdir(parents=True, exist_ok=True)
        with scratch_folder(root) as scratch:
            # Minari writes where this points to, step by step.
            os.environ["MINARI_DATASETS_PATH"] = str(scratch)
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
            replace_folder(scratch, identity, folder)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {name} ({error})") from error
    finally:
        os.environ.pop("MINARI_DATASETS_PATH", None)
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before


def check(name: str, overwrite: bool) -> None:
    """Raise `InputError` where `write` would find the data set there."""
    if path(name).exists() and not overwrite:
        raise InputError(f"{name} exists already; choose another ID, or replace it with --overwrite")


def path(name: str) -> Path:
    """The folder of `minari:ID`, which may not be there."""
    _package()
    # Its own function makes the folder of all sets, which a refusal would leave behind.
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    return Path(root) / name.removeprefix(PREFIX)


def _space(array: Array, bound: float) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(-bound, bound, array.shape[1:], np.float32)


def _package() -> Any:
    try:
        return importlib.import_module("minari")
    except ImportError as error:
        raise InputError(
            f"minari cannot be imported ({error}); install it by `pip install 'mopo_fast[minari]'`"
        ) from error
