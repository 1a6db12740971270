"""Checks of readers with garbled files: every reader must refuse them with one sentence."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mopo_fast.errors import InputError

GONE = object()
VALUES: list[Any] = [
    None,
    True,
    -1,
    2**64,
    10**400,
    1.5,
    -1e308,
    "x",
    "\x00",
    [],
    [[None]],
    {},
    {"a": [1]},
    GONE,
]


def changes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Yield changes of a JSON value: the place of a change, the new value there, and the changed whole.

    Only the first and last elements of a list are changed.
    """
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list) and value:
        keys = sorted({0, len(value) - 1})
    for key in keys:
        for other in VALUES:
            changed = copy.copy(value)
            if other is GONE:
                del changed[key]
            else:
                changed[key] = other
            if changed != value:
                yield (*path, key), other, changed
        for where, other, inner in changes(value[key], (*path, key)):
            changed = copy.copy(value)
            changed[key] = inner
            yield where, other, changed


def check_json(path: Path, read: Callable[[], Any], may_pass: Callable[[tuple[Any, ...], Any], bool]) -> None:
    """Check that each change of a JSON file makes `read` raise `InputError`, unless it may pass."""
    whole = json.loads(path.read_text())
    try:
        for where, other, changed in changes(whole):
            path.write_text(json.dumps(changed))
            expect(read, may_pass(where, other), f"{where} = {other!r}")
        for text in (
            "",
            "{",
            "[]",
            "null",
            "3",
            "[" * 100_000,
            '{"a":' * 900 + "1" + "}" * 900,
            "NaN",
            "\x00",
        ):
            path.write_text(text)
            expect(read, False, text[:20])
    finally:
        path.write_text(json.dumps(whole))


def expect(read: Callable[[], Any], may_pass: bool, what: str) -> None:
    """Check that `read` raises `InputError`, or nothing if `may_pass`."""
    try:
        read()
    except InputError:
        return
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    assert may_pass, f"{what} was taken"


def check_bytes(path: Path, read: Callable[[], Any]) -> None:
    """Change three bytes of a file, 400 times: `read` must succeed or raise an `InputError` with its name."""
    whole, random, messages = path.read_bytes(), np.random.default_rng(0), []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.integers(len(damaged))] = random.integers(256)
        path.write_bytes(damaged)
        try:
            read()
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(str(path)) for message in messages)


def check_tensors(path: Path, read: Callable[[], Any]) -> None:
    """Check that missing tensors and other shapes or types raise an `InputError` with the file's name."""
    whole, metadata = read_tensors(path)
    try:
        for name, tensor in whole.items():
            others = [None, torch.zeros(3, 3, 3, 3), tensor.flatten()[:0], tensor.to(torch.float8_e4m3fn)]
            others += [tensor.to(dtype) for dtype in (torch.float64, torch.int16) if dtype != tensor.dtype]
            others += [torch.full_like(tensor, torch.nan)] if tensor.is_floating_point() else []
            for other in others:
                kept = {key: value for key, value in whole.items() if key != name}
                save_file(kept | ({} if other is None else {name: other}), path, metadata)
                with pytest.raises(InputError, match=path.name):
                    read()
    finally:
        save_file(whole, path, metadata)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return copies of the tensors in a safetensors file, and its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    return {name: tensor.clone() for name, tensor in load_file(path).items()}, metadata
