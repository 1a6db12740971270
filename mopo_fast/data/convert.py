"""Convert data sets from one file format to another without changing their rows."""

from typing import Any

import torch

from mopo_fast.data import d4rl, find_dataset, minari
from mopo_fast.data.files import from_arrays, open_file, step_limits
from mopo_fast.data.formats import check_file
from mopo_fast.data.names import rename
from mopo_fast.data.shards import shard_arrays
from mopo_fast.data.stored import read_all
from mopo_fast.data.write import write_arrays


def convert(source: str, target: str, *, overwrite: bool = False, quiet: bool = False) -> int:
    """Write the data set `source` as `target`, whole or not at all, and return the number of its rows.

    .hdf5, .h5 and .npz files get everything, including rows without a successor, `infos` and `metadata`. HDF5
    is written uncompressed. Minari sets get the transitions that `load_dataset` returns, the ends of the
    episodes, and the metadata.

    Args:
        source: name or path of a data set, as for `load_dataset`.
        target: path of a file that ends in .hdf5, .h5 or .npz, or `minari:ID`.
        overwrite: replace an existing target.
        quiet: show no progress bar.

    Raises:
        InputError: `source` is damaged; `target` exists, has an unknown format or cannot be written.
    """
    to_minari = target.startswith(minari.PREFIX)
    minari.check(target, overwrite) if to_minari else check_file(target, overwrite)
    arrays = _read(source, quiet)
    data = from_arrays(arrays, source=source).validate()
    if not to_minari:
        write_arrays(target, arrays)
        return len(arrays["rewards"])
    timeouts = data.timeouts
    if timeouts is None:
        timeouts = torch.from_numpy(step_limits(data.terminals.numpy(), after_terminal=0))
    columns = {name: array.numpy() for name, array in data.arrays().items()}
    minari.write(
        target, {**columns, "timeouts": timeouts.numpy()}, data.info["metadata"], overwrite=overwrite
    )
    return len(data)


def _read(source: str, quiet: bool) -> dict[str, Any]:
    """Read all arrays and the metadata of a data set, under D4RL's flat keys."""
    if source.startswith(minari.PREFIX):
        return minari.read(source)
    path, name = find_dataset(source)
    if name in d4rl.LOCATIONS:
        path = d4rl.fetch(name, quiet=quiet)
    if path.is_dir():
        return shard_arrays(path)
    with open_file(path) as file:
        return rename(read_all(path, file), str(path))
