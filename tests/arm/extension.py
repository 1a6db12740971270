"""The extension `mopo_fast._cpu` of another architecture, for the tests of kernels.

Each call runs in a process of tests/arm/driver.cpp, under QEMU. The arrays at the addresses that it is given
are sent there, and those that the call has written come back. With `install`, all of mopo_fast uses it.
"""

import ctypes
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_fast import _cpu

Array = npt.NDArray[Any]
# Bytes of the arrays of a rollout's output, in their order; and of a source of SAC's.
_OUT = (4, 4, 4, 4, 1, 4, 4, 4, 8, 4)
_SOURCE = (4, 4, 4, 4, 1)
_SECONDS = 600


class ThreadError(RuntimeError):
    """As in `_cpu`; never raised here."""


class Packed:
    """A network, whose weights are copied at once and packed at each call."""

    def __init__(self, network: Any, precision: int) -> None:
        self._precision = precision
        self._last = _bytes(network[1][-1], 4 * network[2][-1] * network[3])
        self.message = _network(network)

    def resembles(self, network: Any) -> bool:
        return self._last == _bytes(network[1][-1], 4 * network[2][-1] * network[3])


class _Call:
    """The arguments of SacCall or FitCall."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


class SacCall(_Call):
    """SAC updates of one run."""


class FitCall(_Call):
    """Fit steps of one run."""


class Message:
    """A call as bytes, and the arrays that its reply fills."""

    def __init__(self, name: str) -> None:
        self.parts: list[bytes] = []
        self.filled: list[Array] = []
        self.text(name)

    def text(self, text: str) -> None:
        self.blob(text.encode())

    def blob(self, data: bytes) -> None:
        self.whole(len(data))
        self.parts.append(data)

    def whole(self, *numbers: int) -> None:
        # Seeds have 64 bits without a sign.
        self.parts += [struct.pack("<Q", int(number) % 2**64) for number in numbers]

    def number(self, *numbers: float) -> None:
        self.parts += [struct.pack("<d", number) for number in numbers]

    def raw(self, data: bytes) -> None:
        self.parts.append(data)

    def array(self, address: int, size: int) -> None:
        """Add `size` bytes at an address; none at address 0."""
        self.blob(_bytes(address, size))

    def writable(self, address: int, size: int) -> None:
        self.rows((address, size), 1, size, 1, writable=True)

    def rows(
        self, array: tuple[int, int], rows: int, width: int, itemsize: int, *, writable: bool = False
    ) -> None:
        """Add `rows` rows of `width` numbers that begin a stride apart; array is (address, stride)."""
        address, stride = array
        if address == 0 or rows * width == 0:
            view = np.zeros(0, np.uint8)
        else:
            memory = _memory(address, ((rows - 1) * stride + width) * itemsize)
            view = np.lib.stride_tricks.as_strided(memory, (rows, width * itemsize), (stride * itemsize, 1))
        self.blob(view.tobytes())
        if writable:
            self.filled.append(view)

    def send(self) -> list[float]:
        """Run the call, and return its results."""
        reply = _run(b"".join(self.parts))
        (count,) = struct.unpack_from("<q", reply)
        results = list(struct.unpack_from(f"<{count}d", reply, 8))
        at = 8 + 8 * count
        for view in self.filled:
            view[...] = np.frombuffer(reply, np.uint8, view.size, at).reshape(view.shape)
            at += view.size
        assert at == len(reply)
        return results


def install(command: Sequence[str]) -> list[str]:
    """Let mopo_fast call the driver that `command` runs; return the driver's instruction sets."""
    global _run

    def run(message: bytes) -> bytes:
        done = subprocess.run(
            list(command), input=message, capture_output=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the driver failed ({done.returncode}): {done.stderr.decode()}")
        return done.stdout

    _run = run
    names = _run(b"".join(Message("isas").parts)).decode().split()
    made = ModuleType("mopo_fast._cpu")
    functions: dict[str, Callable[..., Any]] = {
        "isas": lambda: names, "rollout": rollout, "least_values": least_values, "sac_updates": sac_updates,
        "fit_steps": fit_steps, "math": math_function,
        "pack": lambda network, isa, precision: Packed(network, precision),
    }  # fmt: skip
    for name in ("penalties", "philox4x32", "MathFunction"):
        functions[name] = getattr(_cpu, name)
    for name, value in functions.items():
        setattr(made, name, value)
    made.Packed, made.SacCall, made.FitCall = Packed, SacCall, FitCall  # type: ignore[attr-defined]
    made.ThreadError = ThreadError  # type: ignore[attr-defined]
    sys.modules["mopo_fast._cpu"] = made
    sys.modules["mopo_fast"]._cpu = made  # type: ignore[attr-defined]
    return names


_run: Callable[[bytes], bytes]


def rollout(**given: Any) -> tuple[int, int, int]:
    message = Message("rollout")
    message.text(given["isa"])
    obs, act, batch = given["obs_dim"], given["act_dim"], given["batch"]
    members, outputs = given["dynamics"][3], obs + 1
    message.whole(obs, act)
    message.raw(given["packed"].message)
    for name, count in (("input_mean", obs + act), ("input_std", obs + act)):
        message.array(given[name], 4 * count)
    for name in ("max_logvar", "min_logvar"):
        message.array(given[name], 4 * members * outputs)
    message.array(given["carry"], 4 * obs)
    message.whole(given["log_std"])
    for name in ("elites", "penalty_members"):
        message.whole(given[f"num_{name}"])
        message.array(given[name], 8 * given[f"num_{name}"])
    message.whole(_cpu.penalties().index(given["penalty"]))
    message.number(given["penalty_coef"])
    message.whole(given["penalties"])
    message.number(given["truncate_at"])
    message.whole(given["halts"])
    message.number(given["halt_reward"])
    message.whole(given["keep_member"])
    message.array(given["low"], 4 * obs)
    message.array(given["high"], 4 * obs)
    message.raw(_network(given["policy"]))
    message.number(given["log_std_min"], given["log_std_max"])
    message.array(given["actions"], 4 * batch * act)
    message.whole(batch)
    message.array(given["start"], 4 * batch * obs)
    message.array(given["rows"], 8 * batch)
    message.whole(given["horizon"], given["first_step"], given["seed"], given["mean_actions"])
    message.whole(given["deterministic"], given["precision"], given["keep_every_row"])
    widths = (obs, act, 1, obs, 1, 1, 1, 1, 1, 1)
    for array, width, itemsize in zip(given["out"], widths, _OUT, strict=True):
        message.rows(array, given["capacity"], width, itemsize, writable=True)
    message.whole(given["capacity"], given["head"])
    for name in ("mean", "std"):
        message.writable(given[name], 4 * members * batch * outputs)
    message.whole(given["threads"])
    written, cut, truncated = message.send()
    return int(written), int(cut), int(truncated)


def least_values(**given: Any) -> bool:
    message = Message("least_values")
    message.text(given["isa"])
    obs, rows = given["obs_dim"], given["members"] * given["rows"]
    message.whole(obs, given["act_dim"])
    message.raw(_network(given["policy"]))
    message.raw(_network(given["critics"]))
    message.number(given["log_std_min"], given["log_std_max"])
    for name in ("mean", "std"):
        message.array(given[name], 4 * rows * obs)
    message.whole(given["samples"], given["members"], given["rows"], given["seed"], given["precision"])
    message.writable(given["q"], 4 * given["samples"] * rows)
    message.whole(given["threads"])
    return bool(message.send()[0])


def sac_updates(calls: Sequence[SacCall], *, isa: str, threads: int) -> list[list[float]]:
    return [_sac(call.arguments, isa, threads) for call in calls]


def _sac(given: dict[str, Any], isa: str, threads: int) -> list[float]:
    message = Message("sac_updates")
    message.text(isa)
    obs, act = given["obs_dim"], given["act_dim"]
    message.whole(obs, act, given["critics"], given["target_critics"])
    _add_layers(message, given["actor"], 1)
    _add_layers(message, given["critic"], given["critics"])
    _add_parameter(message, [*given["log_alpha"], 0], 1)
    message.number(*given["learning_rates"])
    for name in ("discount", "polyak", "target_entropy", "log_std_min", "log_std_max", "log_prob_epsilon"):
        message.number(given[name])
    message.number(given["alpha_max"], given["critic_loss_scale"], given["target_min"])
    message.whole(given["entropy_backup"], given["mean_actor"], given["order"])
    message.number(given["adam_epsilon"])
    message.whole(given["precision"])
    for name in ("real", "model"):
        arrays, size = given[name]
        message.whole(size)
        for array, width, itemsize in zip(arrays, (obs, act, 1, obs, 1), _SOURCE, strict=True):
            message.rows(array, size, width, itemsize)
    message.whole(given["real_rows"], given["model_rows"], given["in_order"], given["updates"])
    message.whole(given["updates_before"], given["first_draw"], given["seed"], threads)
    results = message.send()
    steps = given["updates_before"] + given["updates"]
    _count(given["steps"], steps)
    if given["count"]:
        _memory(given["count"], 8).view(np.int64)[0] = steps
    return results


def fit_steps(calls: Sequence[FitCall], *, isa: str, threads: int) -> list[float]:
    return [_fit(call.arguments, isa, threads) for call in calls]


def _fit(given: dict[str, Any], isa: str, threads: int) -> float:
    message = Message("fit_steps")
    message.text(isa)
    members, dims, count = given["members"], given["dims"], given["count"]
    message.whole(members, dims)
    _add_layers(message, given["layers"], members)
    message.whole(len(given["norms"]))
    for (_, after, _), norm in zip(given["layers"], given["norms"], strict=False):
        for addresses in norm:  # scale and shift
            _add_parameter(message, [*addresses, 0], members * after)
    message.whole(given["activation"])
    for name in ("max_logvar", "min_logvar"):
        _add_parameter(message, [*given[name], 0], dims)
    width = (given["targets"] - given["inputs"]) // 4
    message.whole(given["stride"], width)
    stride = given["rows_stride"]
    every = _memory(given["rows"], 4 * ((members - 1) * stride + count)).view(np.int32)
    rows = np.lib.stride_tricks.as_strided(every, (members, count), (4 * stride, 4))
    message.array(given["inputs"], 4 * given["stride"] * (int(rows.max()) + 1))
    message.whole(count)
    message.blob(rows.tobytes())
    message.whole(given["batch"])
    message.number(given["learning_rate"], given["logvar_bound_weight"])
    message.blob(np.array(given["weight_decay"], np.float32).tobytes())
    message.whole(given["steps_before"], given["precision"], threads)
    (loss,) = message.send()
    _count(given["steps"], given["steps_before"] + math.ceil(count / given["batch"]))
    return loss


def math_function(isa: str, function: Any, x: int, y: int, count: int) -> None:
    message = Message("math")
    message.text(isa)
    message.whole(int(function), count)
    message.array(x, 4 * count)
    message.writable(y, 4 * count)
    message.send()


def _memory(address: int, size: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))


def _bytes(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size) if address and size else b""


def _network(network: Any) -> bytes:
    weights, biases, sizes, networks, activation, scales, shifts = network
    message = Message("")
    message.parts.clear()
    message.whole(networks, activation, len(weights), sizes[0] if sizes else 0)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        before, after = sizes[layer : layer + 2]
        message.whole(after)
        message.array(weight, 4 * networks * before * after)
        message.array(bias, 4 * networks * after)
        for norms in (scales, shifts):
            message.array(norms[layer] if layer < len(norms) else 0, 4 * networks * after)
    return b"".join(message.parts)


def _add_layers(message: Message, layers: Any, networks: int) -> None:
    message.whole(len(layers))
    for before, after, addresses in layers:
        message.whole(before, after)
        _add_parameter(message, addresses[:4], networks * before * after)
        _add_parameter(message, addresses[4:], networks * after)


def _add_parameter(message: Message, addresses: Sequence[int], count: int) -> None:
    for address in addresses:
        message.writable(address, 4 * count)


def _count(addresses: Sequence[int], steps: int) -> None:
    for address in addresses:
        _memory(address, 4).view(np.float32)[0] = steps
