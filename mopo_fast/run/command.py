"""The command that makes a run again, from the settings in its config.json."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from tyro.conf import FlagConversionOff

from mopo_fast.config import PRESETS, TrainConfig
from mopo_fast.presets import preset

# Most columns of a line of a command.
_WIDTH = 84


def train_command(recorded: Mapping[str, Any]) -> str:
    """Return the `mopo-fast train` command with every setting that differs from its default, or its preset.

    A long command continues on further lines, as a shell takes it.

    Args:
        recorded: contents of config.json. Keys that are no settings are ignored.
    """
    words, defaults = ["mopo-fast", "train", str(recorded["dataset"])], TrainConfig("")
    if recorded.get("preset") in PRESETS:
        words += ["--preset", recorded["preset"]]
        defaults = preset(recorded["preset"], "")
    lines = [shlex.join(words)]
    for words in _flags(recorded, defaults):
        text = shlex.join(words)
        if len(lines[-1]) + 1 + len(text) <= _WIDTH:
            lines[-1] += f" {text}"
        else:
            lines.append(f"    {text}")
    return " \\\n".join(lines)


def flatten(recorded: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all settings of a config.json, with names such as "sac.batch_size".

    Args:
        recorded: contents of config.json, or a part of it.
        path: name of that part, with a dot at the end.
    """
    for name, value in recorded.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}{name}.")
        else:
            yield path + name, value


def _flags(recorded: Mapping[str, Any], defaults: Any, path: str = "") -> Iterator[list[str]]:
    """Yield the words of each flag: its name and its values."""
    hints = get_type_hints(type(defaults), include_extras=True)
    for field in dataclasses.fields(defaults):
        name, default = field.name, getattr(defaults, field.name)
        value = recorded.get(name, default)
        if dataclasses.is_dataclass(default):
            if isinstance(value, Mapping):
                yield from _flags(value, default, f"{path}{name}.")
            continue
        # JSON has lists in place of tuples.
        default = list(default) if isinstance(default, tuple) else default
        value = list(value) if isinstance(value, tuple) else value
        if name in ("dataset", "preset") or value == default:
            continue
        metadata = getattr(hints[name], "__metadata__", ())
        prefixed = all(getattr(item, "prefix_name", None) is not False for item in metadata)
        prefix = f"--{path if prefixed else ''}"
        words = name.replace("_", "-")
        if isinstance(value, bool) and FlagConversionOff not in metadata:
            yield [f"{prefix}{words}" if value else f"{prefix}no-{words}"]
            continue
        yield [prefix + words, *map(str, value if isinstance(value, list) else [value])]
