"""Read and write Minari's data sets, `minari:ID`, by its package (`pip install 'minari[hdf5,hf]'`)."""

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
from mopo_fast.data.local import MINARI_PREFIX
from mopo_fast.data.stored import check_fits, reading
from mopo_fast.errors import InputError
from mopo_fast.utils.atomic import read_json_as, replace_folder, scratch_folder

Array = npt.NDArray[Any]

PREFIX = MINARI_PREFIX

_CLASS = "minari.dataset.minari_dataset.MinariDataset"

# Every episode has at least eight HDF5 objects, and sets have up to some ten thousand episodes.
_MAX_OBJECTS = 10_000_000


def read(name: str) -> dict[str, Any]:
    """Read the data set `minari:ID` as D4RL's arrays and metadata. It is downloaded unless it is there.

    Actions are scaled from the range of a bounded action space to [-1, 1].

    Raises:
        InputError: the package or the data set is missing, or observations or actions are not vectors.
    """
    minari, folder = _package(), _fetch(name)
    try:
        _check_files(folder)
        dataset = minari.load_dataset(name.removeprefix(PREFIX))
    except InputError:
        raise
    # Minari's storages raise many kinds of errors.
    except Exception as error:
        raise _not_loaded(name, error) from error
    return read_object(dataset, name)


def read_metadata(name: str) -> dict[str, Any]:
    """Read the texts and numbers in the metadata of `minari:ID`. It is downloaded unless it is there.

    Raises:
        InputError: the package or the data set is missing, or metadata.json is damaged.
    """
    return _all_metadata(name, read_json_as(_fetch(name) / "metadata.json", dict[str, Any]))


def _fetch(name: str) -> Path:
    """Return the folder of the files of `minari:ID`, and download them unless they are there."""
    minari, folder = _package(), path(name) / "data"
    try:
        if not folder.exists():
            minari.download_dataset(name.removeprefix(PREFIX))
    # Minari's hosts raise many kinds of errors.
    except Exception as error:
        raise _not_loaded(name, error) from error
    return folder


def _all_metadata(name: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts and numbers of a data set's metadata, with those that `write` has added."""
    metadata = _texts_and_numbers(stored)
    with reading(Path(name) / "metadata.json", "JSON"):
        metadata |= _texts_and_numbers(json.loads(metadata.get("mopo_fast", "{}")))
    metadata.pop("mopo_fast", None)
    return metadata


def is_minari(source: object) -> bool:
    """Tell whether an object is a `minari.MinariDataset`, without importing the package."""
    return any(f"{kind.__module__}.{kind.__name__}" == _CLASS for kind in type(source).__mro__)


def read_object(dataset: Any, name: str) -> dict[str, Any]:
    """Read a `minari.MinariDataset` as D4RL's arrays and metadata, as `read` does.

    Args:
        dataset: the data set.
        name: its name in errors.

    Raises:
        InputError: an episode cannot be read, or observations or actions are not vectors.
    """
    try:
        stored = dataset.storage.metadata
        episodes = list(dataset.iterate_episodes())
    # Minari's storages raise many kinds of errors.
    except Exception as error:
        raise _not_loaded(name, error) from error
    for key, space in ("observations", dataset.observation_space), ("actions", dataset.action_space):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise InputError(f"{name}: {key} must be vectors, got {space}")
    if not episodes:
        raise InputError(f"{name} has no episodes; choose another data set")
    for number, episode in enumerate(episodes):
        _check_episode(f"episode {number} of {name}", episode, dataset)

    def joined(part: Any) -> Array:
        return np.concatenate([np.asarray(part(episode)) for episode in episodes])

    low, high = dataset.action_space.low, dataset.action_space.high
    actions = joined(lambda episode: episode.actions)
    if np.isfinite([low, high]).all() and not (np.all(low == -1) and np.all(high == 1)):
        # An empty range gives actions that are not finite, which a later check reports.
        with np.errstate(all="ignore"):
            actions = 2.0 * (actions - low.astype(np.float64)) / (high - low) - 1.0
    terminals = joined(lambda episode: episode.terminations)
    last = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    timeouts = joined(lambda episode: episode.truncations)
    # An episode without a recorded end was cut off.
    timeouts[last] = ~terminals[last]
    metadata = _all_metadata(name, stored)
    return {
        "observations": joined(lambda episode: episode.observations[:-1]),
        "actions": actions,
        "rewards": joined(lambda episode: episode.rewards),
        "next_observations": joined(lambda episode: episode.observations[1:]),
        "terminals": terminals,
        "timeouts": timeouts & ~terminals,
        **{f"metadata/{key}": value for key, value in metadata.items()},
    }


def _not_loaded(name: str, error: Exception) -> InputError:
    return InputError(f"{name} cannot be loaded ({error}); see `minari list local` and `minari list remote`")


@dataclass(frozen=True)
class _Metadata:
    """The keys of metadata.json that Minari uses. Others are ignored."""

    data_format: str
    total_episodes: int
    total_steps: int
    observation_space: str | None = None
    action_space: str | None = None
    mopo_fast: str = "{}"


def _check_files(folder: Path) -> None:
    """Raise `InputError` where the files of a data set are damaged or too large to be left to Minari."""
    metadata = read_json_as(folder / "metadata.json", _Metadata)
    if metadata.data_format == "hdf5":
        with open_hdf5(folder / "main_data.hdf5", _MAX_OBJECTS) as file:
            # Memory holds the episodes and the joined arrays at once.
            check_fits(folder, 2 * sum(item.nbytes for item in file.values()), "")


def _check_episode(name: str, episode: Any, dataset: Any) -> None:
    steps = np.size(episode.rewards)
    if steps == 0:
        raise InputError(f"{name} has no steps; remove it from the data set")
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
            raise InputError(f"{part} of {name} must be {takes} of shape {shape}, got {got}")


def _texts_and_numbers(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if isinstance(value, (str, int, float))}


def write(
    name: str, arrays: Mapping[str, Array], metadata: Mapping[str, str | float], *, overwrite: bool = False
) -> None:
    """Write transitions as the data set `minari:ID`, whole or not at all.

    An episode ends at a flag, or where the next row is not the successor.

    Args:
        name: `minari:ID`.
        arrays: observations, actions, rewards, next_observations, terminals, timeouts, by these names.
        metadata: texts and numbers to store with the data set.
        overwrite: replace an existing data set.

    Raises:
        InputError: the package is missing, the ID is invalid, the data set exists and `overwrite` is False,
            or the folder cannot be written.
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
            # Minari writes its files one by one, below this folder.
            os.environ["MINARI_DATASETS_PATH"] = str(scratch)
            with warnings.catch_warnings():
                # Minari warns of missing authors, links and environments, which these data do not need.
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
    """Raise `InputError` where the data set exists and `overwrite` is False."""
    if path(name).exists() and not overwrite:
        raise InputError(f"{name} exists already; choose another ID, or replace it with --overwrite")


def path(name: str) -> Path:
    """Return the folder of `minari:ID`, which may not exist."""
    _package()
    # Minari's own function creates the folder of all sets, which would remain after an error.
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    return Path(root) / name.removeprefix(PREFIX)


def _space(array: Array, bound: float) -> gymnasium.spaces.Box:
    return gymnasium.spaces.Box(-bound, bound, array.shape[1:], np.float32)


def _package() -> Any:
    try:
        return importlib.import_module("minari")
    except ImportError as error:
        raise InputError(
            f"minari cannot be imported ({error}); install it with `pip install 'minari[hdf5,hf]'`"
        ) from error
