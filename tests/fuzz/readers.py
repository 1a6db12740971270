"""The package's file readers: how each one's input is made and read, and which need no fuzzing.

Add a new reader to `ENTRIES`, or to `EXEMPT` with a reason; a test fails for readers that are in neither.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import matplotlib
import numpy as np
import pyarrow.parquet
import torch
from torch import nn

from mopo_fast import compare, sweep, train
from mopo_fast.bulk.files import file_checksum
from mopo_fast.bulk.generate import generate
from mopo_fast.bulk.plan import run_settings
from mopo_fast.bulk.read import as_text, summarise, verify
from mopo_fast.bulk.write import generate_shards
from mopo_fast.collect import collect
from mopo_fast.compat import Checkpoint, convert_checkpoint, get_format, offlinerl_kit
from mopo_fast.config import (
    DataConfig,
    DynamicsConfig,
    EvaluationConfig,
    Hints,
    OnlineConfig,
    RolloutConfig,
    SACConfig,
    TrainConfig,
)
from mopo_fast.data import Transitions, d4rl, load_configured, load_dataset, minari
from mopo_fast.data.convert import convert
from mopo_fast.data.manifest import Manifest, algorithm_of
from mopo_fast.data.origin import find_origin
from mopo_fast.data.rewards import relabel_file
from mopo_fast.data.shards import open_rollouts
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.fit import fit_dynamics
from mopo_fast.policy import Actor
from mopo_fast.report import write_report
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run import checkpoint, log
from mopo_fast.run.find import find_run_dataset, read_data_config
from mopo_fast.run.folder import read_config
from mopo_fast.run.resolve import check_run_data
from mopo_fast.select import select
from mopo_fast.utils.atomic import read_json

from .children import Entry, check_secret

OBS, ACT, ROWS = 3, 2, 24

# Functions that read files but get no mutated ones, with the reason.
EXEMPT = {
    "mopo_fast.utils.atomic:sweep": "opens temporary files to lock them, and reads nothing",
    "mopo_fast.utils.atomic:sync_folder": "opens a folder to flush it",
    "mopo_fast.rollout:RolloutEngine.penalty_quantile": "calls `load_dataset`, which has joined",
    "mopo_fast.rollout:RolloutEngine.rollout": "calls `load_dataset`, which has joined",
    "mopo_fast.utils.atomic:scratch_folder": "opens a folder to lock it",
    "mopo_fast.utils.atomic:_remove_unlocked": "opens a folder to lock it",
    "mopo_fast.utils.atomic:_parse": "is called by readers, which join by themselves",
    "mopo_fast.utils.atomic:_validate": "is called by readers, which join by themselves",
    "mopo_fast.cli:fit": "hands a name to load_dataset",
    "mopo_fast.cli:rollout": "hands a name to load_dataset",
    "mopo_fast.cli:info": "hands a name to load_dataset",
    "mopo_fast.run.resolve:take_data": "hands data in memory to load_dataset",
    "mopo_fast.run.opening:_named_by_file": "reads a file that load_dataset has read",
    "mopo_fast.run.fit_log:open_fit_log": "opens a new file to write to it",
    "mopo_fast.run.folder:_ways_on": "reads a config.json that holds_run has read",
    "mopo_fast.tasks:resume_command": "takes one text of a config.json, and none where it is damaged",
    "mopo_fast.__main__:_open_closed_streams": "opens /dev/null for a closed stream",
    "mopo_fast.__main__:run": "opens /dev/null for a closed pipe",
    "mopo_fast.data.d4rl:_transfer": "copies bytes from the network, which download checks",
    "mopo_fast.data.hdf5_writer:Output.__init__": "opens a file of its own to write to it",
    "mopo_fast.doctor:_cpuinfo": "reads the kernel's /proc/cpuinfo",
    "mopo_fast.utils.machine:_control_groups": "reads the kernel's /proc and /sys",
    "mopo_fast.utils.machine:_kilobytes": "reads the kernel's /proc/meminfo",
    "mopo_fast.utils.machine:map_mode": "reads the kernel's /proc/sys/vm/overcommit_memory",
    "mopo_fast.utils.machine:file_backed": "maps a temporary file of its own",
    "mopo_fast.collect.online:OnlineTraining._settings": "parses JSON that it has just made",
    "mopo_fast.run.log:append_row": "adds a line to a file, and reads nothing",
    "mopo_fast.bulk.files:write_file": "writes into a file of its own, and reads it for its checksum",
    "mopo_fast.sweep:_fit": "hands a name to load_dataset",
    "mopo_fast.tasks:_read_task_file": "runs a Python file, which is trusted by being named",
    "mopo_fast.export:_torch_runner": "loads a file that export has just written",
    "mopo_fast.hub:_stage": "copies files of a run, which push then reads by readers that join by themselves",
    "mopo_fast.hub:_copy_cached": "copies files, which pull then reads by readers that join by themselves",
    "mopo_fast.run.folder:as_json": "parses JSON that it has just made",
}


# --- Parts of inputs, and uses of the data that were read


def arrays(number: int, obs: int = OBS, act: int = ACT, rows: int = ROWS) -> dict[str, Any]:
    """Make the arrays of a D4RL data set of a few episodes."""
    random = np.random.default_rng(number)
    terminals = np.zeros(rows, bool)
    timeouts = np.zeros(rows, bool)
    terminals[5 + number :: 11], timeouts[9 + number :: 11] = True, True
    return {
        "observations": random.uniform(-1, 1, (rows, obs)).astype(np.float32),
        "actions": random.uniform(-1, 1, (rows, act)).astype(np.float32),
        "rewards": random.uniform(-1, 1, rows).astype(np.float32),
        "next_observations": random.uniform(-1, 1, (rows, obs)).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def write_hdf5(
    path: str | Path, content: dict[str, Any], metadata: dict[str, Any] | None = None, **how: Any
) -> None:
    with h5py.File(path, "w", locking=False) as file:
        for name, array in content.items():
            file.create_dataset(name, data=array, **how)
        for name, value in (
            metadata or {"name": "data-local", "seed": 1, "policy/weight": np.ones(3)}
        ).items():
            file[f"metadata/{name}"] = value


def touch(data: Transitions) -> None:
    """Read every value of a data set, and one batch of it as training does."""
    for array in data.arrays().values():
        check_secret(array.numpy())
        array.double().sum().item()
    data[torch.arange(len(data)).flip(0)[:5]].validate()
    for value in data.info.get("metadata", {}).values():
        str(value)


def use(checkpoint: Checkpoint | EnsembleDynamics | Actor) -> None:
    """Make a step of the kernels, which trust the numbers of the models."""
    if isinstance(checkpoint, EnsembleDynamics):
        checkpoint = Checkpoint(checkpoint)
    elif isinstance(checkpoint, Actor):
        checkpoint = Checkpoint(policy=checkpoint)
    model, actor = checkpoint.dynamics, checkpoint.policy
    if actor is not None:
        actor.act(torch.zeros(4, actor.obs_dim), torch.zeros(4, actor.act_dim))
    if model is None:
        return
    engine = RolloutEngine(model, backend="cpu", threads=1)
    observations = torch.zeros(5, model.obs_dim)
    engine.step(observations, torch.zeros(5, model.act_dim), seed=1, distributions=True)
    if actor is not None and (actor.obs_dim, actor.act_dim) == (model.obs_dim, model.act_dim):
        touch(engine.rollout(actor, observations, 2, seed=1))


@contextlib.contextmanager
def even_clock() -> Iterator[None]:
    """Replace measured times by constants, so that the same bytes are written every time."""
    clock, before = itertools.count(), time.perf_counter
    time.perf_counter = lambda: float(next(clock))
    try:
        yield
    finally:
        time.perf_counter = before


def seeded(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)


def ensemble(number: int, obs: int = OBS, act: int = ACT, **options: Any) -> EnsembleDynamics:
    seeded(number)
    options = {"members": 3, "elites": 2, "hidden": (8, 8)} | options
    model = EnsembleDynamics(obs, act, **options)
    model.input_std.uniform_(0.5, 2.0)
    return model


def actor(number: int, obs: int = OBS, act: int = ACT, **options: Any) -> Actor:
    seeded(number)
    return Actor(obs, act, **{"hidden": (8, 8)} | options)


# --- Data sets

FILES = ("mopo_fast.data.files:load_file", "mopo_fast.data:_load")
HDF5 = (
    *("mopo_fast.data.formats:has_hdf5_signature", "mopo_fast.data.hdf5:_open"),
    *("mopo_fast.data.hdf5:_Walk.__init__", *FILES),
    *("mopo_fast.data.hdf5:_Walk._probe", "mopo_fast.data.hdf5:_Walk._text_reader"),
)
NPZ = ("mopo_fast.data.npz:open_npz", "mopo_fast.data.npz:_member", *FILES)


def _make_mapped(number: int) -> None:
    write_hdf5("data.hdf5", arrays(number), {"name": "data-local", "seed": 1})


def _make_hdf5(*without: str, **how: Any) -> Callable[[int], None]:
    def make(number: int) -> None:
        content = {key: array for key, array in arrays(number).items() if key not in without}
        write_hdf5("data.hdf5", content, **how)

    return make


def _make_npz(number: int) -> None:
    np.savez("data.npz", **arrays(number), **{"metadata/name": np.array(b"data-local")})


def _make_parquet(number: int) -> None:
    """Write vectors as lists of any length, as pandas does."""
    columns = {name: pyarrow.array(array.tolist()) for name, array in arrays(number).items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), "data.parquet")


def _make_neorl(number: int) -> None:
    names = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}
    content = arrays(number)
    known = {theirs: content[ours] for theirs, ours in names.items()}
    np.savez(
        "data.npz", **known, done=content["terminals"].astype(np.float32)[:, None], index=np.array([0, 6, 15])
    )


def _make_trajectories(number: int) -> None:
    content = {key: value for key, value in arrays(number).items() if key != "timeouts"}
    paths = [{key: value[a : a + 8] for key, value in content.items()} for a in range(0, ROWS, 8)]
    Path("data.pkl").write_bytes(pickle.dumps(paths, protocol=4 - 2 * number))


def _make_minari(number: int) -> None:
    minari.write("minari:fuzz/tiny-v0", arrays(number), {"name": "tiny-local", "seed": number})
    path = Path(minari.path("minari:fuzz/tiny-v0"), "data", "metadata.json")
    path.write_text(json.dumps(read_json(path) | {"ref_min_score": number, "ref_max_score": 9.5}))


def _make_local(number: int) -> None:
    Path("data").mkdir()
    write_hdf5("data/hopper_random-local.hdf5", arrays(number))


def _make_served(number: int) -> None:
    Path("gym_mujoco_v2").mkdir()
    write_hdf5("gym_mujoco_v2/hopper_random-v2.hdf5", arrays(number))


def _read_served() -> None:
    d4rl.BASE_URL = Path.cwd().as_uri() + "/"
    if not Path("gym_mujoco_v2/hopper_random-v2.hdf5").is_file():
        raise InputError("a server sends bytes")
    touch(load_dataset("hopper-random-v2", quiet=True))


def _make_relabelled(number: int) -> None:
    write_hdf5("data.hdf5", arrays(number, 17, 6))


def _make_cheetah(number: int) -> None:
    content = arrays(number, 27, 8)
    speeds = {f"infos/{axis}_velocity": content["rewards"] for axis in "xy"}
    write_hdf5("data.hdf5", content | speeds)


def _relabel(task: str) -> None:
    relabel_file("data.hdf5", task, "out.hdf5")
    touch(load_dataset(Path("out.hdf5")))


def _convert(source: str, target: str) -> None:
    convert(source, target, quiet=True)
    touch(load_dataset(target, quiet=True))


def _load(source: str = "data.hdf5", **options: Any) -> Callable[[], None]:
    return lambda: touch(load_dataset(source, quiet=True, **options))


def _load_minari() -> None:
    str(find_origin("minari:fuzz/tiny-v0"))
    _load("minari:fuzz/tiny-v0")()


def _load_as_run() -> None:
    find_origin("data.hdf5")
    touch(load_configured("data.hdf5", DataConfig("offlinerl-kit", max_transitions=20), quiet=True))


_DATA = [
    Entry("hdf5", _make_hdf5(), ("data.hdf5",), _load(), HDF5),
    Entry("hdf5 gzip", _make_hdf5(compression="gzip", shuffle=True), ("data.hdf5",), _load(), HDF5),
    Entry("hdf5 next row", _make_hdf5("next_observations", "timeouts"), ("data.hdf5",), _load(), HDF5),
    Entry("hdf5 as d4rl", _make_hdf5("next_observations"), ("data.hdf5",), _load(compat="d4rl"), HDF5),
    Entry(
        "hdf5 of a run",
        _make_hdf5(),
        ("data.hdf5",),
        _load_as_run,
        (*HDF5, "mopo_fast.data.origin:find_origin", "mopo_fast.data:load_configured"),
    ),
    Entry(
        "hdf5 mapped",
        _make_mapped,
        ("data.hdf5",),
        _load(memory_map=True),
        (*HDF5, "mopo_fast.data.stored:Stored.map"),
    ),
    Entry("npz", _make_npz, ("data.npz",), _load("data.npz"), NPZ),
    Entry(
        "parquet",
        _make_parquet,
        ("data.parquet",),
        _load("data.parquet"),
        (*FILES, "mopo_fast.data.parquet:open_parquet", "mopo_fast.data.parquet:_walk"),
    ),
    Entry("npz of NeoRL", _make_neorl, ("data.npz",), _load("data.npz"), NPZ),
    Entry(
        "pickled trajectories",
        _make_trajectories,
        ("data.pkl",),
        _load("data.pkl"),
        (*FILES, "mopo_fast.data.trajectories:read", "mopo_fast.utils.pickles:load"),
    ),
    Entry(
        "minari",
        _make_minari,
        ("minari/**/*.hdf5", "minari/**/*.json"),
        _load_minari,
        (
            *("mopo_fast.data.minari:read", "mopo_fast.data.minari:read_metadata"),
            *("mopo_fast.data.minari:_check_files", "mopo_fast.data.minari:_all_metadata"),
            "mopo_fast.data.origin:origin_of",
        ),
    ),
    Entry("local set", _make_local, ("data/*.hdf5",), _load("hopper-random-local"), HDF5),
    Entry(
        "d4rl download",
        _make_served,
        ("gym_mujoco_v2/*.hdf5", "d4rl/*.sha256"),
        _read_served,
        ("mopo_fast.data.d4rl:download", "mopo_fast.data.d4rl:_check_sum"),
    ),
    *(
        Entry(
            name,
            make,
            (files,),
            functools.partial(_convert, source, target),
            ("mopo_fast.data.convert:_read",),
        )
        for name, make, files, source, target in (
            ("convert hdf5", _make_hdf5(), "data.hdf5", "data.hdf5", "out.npz"),
            ("convert npz", _make_npz, "data.npz", "data.npz", "out.hdf5"),
            (
                "convert to minari",
                _make_hdf5("next_observations"),
                "data.hdf5",
                "data.hdf5",
                "minari:fuzz/out-v0",
            ),
        )
    ),
    *(
        Entry(
            f"relabel {task}",
            make,
            ("data.hdf5",),
            functools.partial(_relabel, task),
            ("mopo_fast.data.rewards:relabel_file",),
        )
        for task, make in (("halfcheetah-jump", _make_relabelled), ("ant-angle", _make_cheetah))
    ),
]


# --- Our models


def _make_ensemble(number: int) -> None:
    ensemble(number, absolute=[1], member_bounds=bool(number)).save("run")


def _make_actor(number: int) -> None:
    actor(number).save("run")


TENSORS = ("mopo_fast.utils.tensors:load_tensors", "mopo_fast.utils.atomic:_read_json")
_MODELS = [
    Entry(
        "EnsembleDynamics.load",
        _make_ensemble,
        ("run/dynamics.*",),
        lambda: use(EnsembleDynamics.load("run")),
        ("mopo_fast.ensemble:EnsembleDynamics.load", *TENSORS),
    ),
    Entry(
        "Actor.load",
        _make_actor,
        ("run/policy.*",),
        lambda: use(Actor.load("run")),
        ("mopo_fast.policy:Actor.load", *TENSORS),
    ),
]


# --- Models of other code


def _make_model(format_name: str, target: str, policies: bool, **options: Any) -> Callable[[int], None]:
    def make(number: int) -> None:
        model = ensemble(number, **{"activation": "relu"} | options)
        policy = (
            actor(number, activation="relu", log_std_min=options.get("low", -5.0), log_std_max=2.0)
            if policies
            else None
        )
        get_format(format_name).write(Checkpoint(model, policy), Path(target))

    return make


def _compat(
    format_name: str,
    target: str,
    files: tuple[str, ...],
    make: Callable[[int], None],
    *covers: str,
    name: str = "",
    **hints: Any,
) -> Entry:
    module = "native" if format_name == "mopo-fast" else format_name.replace("-", "_")

    def read() -> None:
        use(get_format(format_name).read(Path(target), Hints(**hints)))

    def convert_it() -> None:
        read()
        convert_checkpoint(target, "out", format_name, "mopo-fast", Hints(**hints))  # type: ignore[arg-type]

    full = tuple(
        cover if "." in cover.split(":")[0] else f"mopo_fast.compat.{module}{cover}" for cover in covers
    )
    return Entry(name or format_name, make, files, convert_it, full)


def _make_mopo_tf(number: int) -> None:
    get_format("mopo-tf").write(
        Checkpoint(ensemble(number, activation="silu"), actor(number, activation="relu", log_std_min=-20.0)),
        Path("source"),
    )


def _make_polixir(number: int) -> None:
    model = ensemble(number, log_scale="std", activation="silu")
    if number == 0:
        model.input_std[OBS:], model.input_mean[OBS:] = 1.0, 0.0
    else:
        model.input_std.fill_(1.0)
    policy = actor(number, activation="relu", log_std_min=-5.0, log_std_max=2.0)
    get_format("polixir").write(Checkpoint(model, policy), Path("source"))


def _make_d3rlpy(number: int) -> None:
    model = ensemble(number, log_scale="std", activation="relu", member_bounds=True)
    get_format("d3rlpy").write(Checkpoint(model), Path("model.pt"))
    standard = {"mean": [0.1] * OBS, "std": [1.5] * OBS, "eps": 0.001}
    bounds = {"minimum": [-2.0] * ACT, "maximum": [2.0] * ACT}
    parameters = {
        "scaler": {"type": "standard", "params": standard},
        "action_scaler": {"type": "min_max", "params": bounds},
        "reward_scaler": {
            "type": "standard",
            "params": {"mean": 0.5, "std": 2.0, "eps": 0.001, "multiplier": 1.0},
        },
    }
    Path("params.json").write_text(json.dumps(parameters))


def _make_d3rlpy_policy(number: int) -> None:
    ours, state = actor(number), {}
    for layer, (weight, bias) in enumerate(zip(ours.weights[:-1], ours.biases[:-1], strict=True)):
        state[f"_encoder._fcs.{layer}.weight"] = weight.detach().T.contiguous()
        state[f"_encoder._fcs.{layer}.bias"] = bias.detach().clone()
    for head, half in (("_mu", slice(0, ACT)), ("_logstd", slice(ACT, 2 * ACT))):
        state[f"{head}.weight"] = ours.weights[-1].detach()[:, half].T.contiguous()
        state[f"{head}.bias"] = ours.biases[-1].detach()[half].clone()
    torch.save({"_policy": state, "_q_func": {}}, "model.pt")


class _Layer(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        members, _, outputs = sizes
        for prefix in ("", "saved_"):
            self.register_parameter(f"{prefix}weight", nn.Parameter(torch.zeros(sizes)))
            self.register_parameter(f"{prefix}bias", nn.Parameter(torch.zeros(members, 1, outputs)))


class _Model(nn.Module):
    """OfflineRL-Kit's EnsembleDynamicsModel, as much of it as its files need."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.SiLU()
        self.backbones = nn.ModuleList([_Layer(3, OBS + ACT, 8), _Layer(3, 8, 8)])
        self.output_layer = _Layer(3, 8, 2 * (OBS + 1))
        for name in ("max_logvar", "min_logvar"):
            self.register_parameter(name, nn.Parameter(torch.zeros(OBS + 1)))
        self.elites = nn.Parameter(torch.arange(2), requires_grad=False)


def _load_into_model() -> None:
    model = _Model()
    dynamics: Any = offlinerl_kit.EnsembleDynamics(
        model,
        None,  # type: ignore[arg-type]
        SimpleNamespace(mu=None, std=None),
        lambda *_: np.zeros((5, 1), bool),
        penalty_coef=1.0,
        threads=1,
    )
    dynamics.load("source")
    dynamics.step(np.zeros((5, OBS), np.float32), np.zeros((5, ACT), np.float32))


TORCH = (
    "mopo_fast.compat.torch_files:load",
    "mopo_fast.compat.torch_files:load_state",
    "mopo_fast.utils.zip_files:open_zip",
)
_COMPAT = [
    _compat(
        "offlinerl-kit",
        "source",
        ("source/*",),
        _make_model("offlinerl-kit", "source", True, activation="silu"),
        "mopo_fast.compat.offlinerl_kit.files:_read_dynamics",
        "mopo_fast.compat.offlinerl_kit.files:_read_policy",
        *TORCH,
    ),
    Entry(
        "offlinerl-kit load",
        _make_model("offlinerl-kit", "source", False, activation="silu"),
        ("source/*",),
        _load_into_model,
        ("mopo_fast.compat.offlinerl_kit.dynamics:EnsembleDynamics.load",),
    ),
    _compat(
        "mopo-tf",
        "source",
        ("source/*",),
        _make_mopo_tf,
        *("mopo_fast.compat.mopo_tf.files:_read_policy", "mopo_fast.compat.mopo_tf.files:_read_text"),
        "mopo_fast.compat.matlab_files:load",
    ),
    _compat(
        "mbrl-lib",
        "source",
        ("source/*",),
        _make_model("mbrl-lib", "source", False),
        *(":read", ":_read_scale"),
        activation="relu",
    ),
    _compat(
        "unifloral",
        "ensemble_dynamics_model_hopper-medium-v2_1.pkl",
        ("*.pkl",),
        _make_model("unifloral", "ensemble_dynamics_model_hopper-medium-v2_1.pkl", False),
        "mopo_fast.compat.unifloral.files:read",
    ),
    _compat("polixir", "source", ("source/*",), _make_polixir, ":read"),
    _compat("d3rlpy", "model.pt", ("model.pt", "params.json"), _make_d3rlpy, ":read"),
    _compat("d3rlpy", "model.pt", ("model.pt",), _make_d3rlpy_policy, ":read", name="d3rlpy policy"),
    _compat(
        "mopo-fast",
        "source",
        ("source/*",),
        lambda number: _save_both(number, "source"),
    ),
]


def _save_both(number: int, folder: str) -> None:
    ensemble(number).save(folder)
    actor(number).save(folder)


# --- Runs

HOPPER = {"obs": 11, "act": 3}
CONFIG = TrainConfig(
    dataset="data.hdf5",
    task="hopper",
    seed=1,
    steps=4,
    threads=1,
    backend="cpu",
    dynamics=DynamicsConfig(
        members=3, elites=2, hidden=(8,), weight_decay=(1e-5, 1e-5), max_epochs=3, batch_size=16
    ),
    rollout=RolloutConfig(horizon=2, penalty_coef=1.0, batch_size=8, interval=2, retain_epochs=2),
    sac=SACConfig(hidden=(8,), batch_size=8),
    evaluation=EvaluationConfig(episodes=1, interval=1),
)


def _make_run(number: int) -> None:
    """Make a run of two epochs, stopped after the first: with a checkpoint, without a summary."""
    _make_finished(number)
    last = Path("run/checkpoint")
    for path in last.glob("epoch-*.safetensors"):
        if path != min(last.glob("epoch-*.safetensors")):
            path.unlink()
    Path("run/summary.json").unlink()


def _make_finished(number: int) -> None:
    """Make a finished run."""
    write_hdf5("data.hdf5", arrays(3, 11, 3, 40))
    first = Path("../tmp", f"run-{number}")
    if not first.exists():
        keep_older, checkpoint.remove_older = checkpoint.remove_older, lambda path: None
        write, train.write_report = train.write_report, lambda run, **_: Path(run, "report.html").touch()
        with even_clock():
            train.train(dataclasses.replace(CONFIG, seed=1 + number), first, quiet=True)
        checkpoint.remove_older, train.write_report = keep_older, write
    shutil.copytree(first, "run")
    shutil.rmtree("run/tensorboard-fit", ignore_errors=True)


def _make_first(number: int) -> None:
    """Make a finished run whose dynamics another run takes."""
    _make_finished(number)
    os.replace("run", "first")


class _Board:
    """Stand-in for TensorBoard's log, which waits for a second and is not read."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _resume() -> None:
    log.Board = _Board
    train.train(CONFIG, "run", resume=True, quiet=True)
    use(Actor.load("run"))


def _summarise() -> None:
    """Summarise a run as a sweep does."""
    summary = train.train(CONFIG, "run", resume=True, quiet=True)
    str(summary["return_mean"])
    rows = [sweep._row(CONFIG, Path("run"))]
    sweep._write_csv(Path("sweep.csv"), rows)


def _cheap_pictures() -> None:
    matplotlib.rcParams["savefig.dpi"] = matplotlib.rcParams["figure.dpi"] = 5


def _compare() -> None:
    compared = compare.compare_runs(["run"])
    compare.to_tables(compared, plain=True)
    json.dumps(compare.to_json(compared))


def _select() -> None:
    select("run", starts=2, horizon=2, fqe_updates=1, threads=1, quiet=True)


def _report() -> None:
    from mopo_fast import report

    _cheap_pictures()
    look = report.look

    @contextlib.contextmanager
    def cheap() -> Iterator[None]:
        with look():
            _cheap_pictures()
            yield

    report.look = cheap
    try:
        write_report("run")
    finally:
        report.look = look


def _generate() -> None:
    data = load_dataset("data.hdf5", quiet=True)
    touch(generate("run", data, count=6, threads=1))
    run_settings("run")


def _take_own_data() -> None:
    data = load_configured(find_run_dataset("run"), read_data_config("run"), quiet=True)
    check_run_data(Path("run"), data)
    touch(data)


def _make_models(number: int) -> None:
    """Make a run's settings and models, from which rollouts are made."""
    write_hdf5("data.hdf5", arrays(number, 11, 3, 30))
    ensemble(number, **HOPPER).save("run")
    actor(number, **HOPPER).save("run")
    rollout = {
        "horizon": 3,
        "penalty_coef": 1.0,
        "penalty": "max_aleatoric",
        "penalty_members": "all",
        "termination": None,
    }
    Path("run/config.json").write_text(json.dumps({"task": "hopper", "rollout": rollout}))


class _Stop(Exception):
    pass


def _make_fit(number: int) -> None:
    write_hdf5("data.hdf5", arrays(3, rows=40))

    def stop(epoch: Any) -> None:
        if epoch.epoch == number:
            raise _Stop

    with even_clock(), contextlib.suppress(_Stop):
        _fit(on_epoch=stop)


def _fit(**options: Any) -> None:
    data = load_dataset("data.hdf5", quiet=True)
    use(
        fit_dynamics(
            data,
            seed=1,
            config=CONFIG.dynamics,
            backend="cpu",
            threads=1,
            checkpoint="fit.safetensors",
            **options,
        )
    )


_ONLINE = OnlineConfig(
    environments=1,
    epoch_steps=20,
    random_epochs=1,
    epochs=3,
    round_steps=10,
    medium_score=-1000.0,
    medium_window=1,
    episodes=1,
    sac=SACConfig(hidden=(8,), batch_size=8, target_entropy="act_dim", real_ratio=0.0),
)


def _make_online(number: int) -> None:
    with even_clock():
        collect("hopper-medium", 5, out="first.hdf5", seed=0, threads=1, quiet=True, online=_ONLINE)
    Path("first.hdf5").unlink()
    if number == 1:
        # The files of a longer training, with one more epoch.
        for epoch in (1, 2):
            shutil.copy(f"data/online/hopper-seed0/rows-00000{3 - epoch}.safetensors", "rows")
            os.replace("rows", f"data/online/hopper-seed0/rows-00000{epoch}.safetensors")


def _go_on_online() -> None:
    collect("hopper-full-replay", out="out.hdf5", seed=0, threads=1, quiet=True, online=_ONLINE)
    touch(load_dataset(Path("out.hdf5")))


_RUNS = [
    Entry(
        "train --resume",
        _make_run,
        ("run/*.json", "run/*.csv", "run/*.safetensors", "run/checkpoint/*", "run/checkpoint/*", "data.hdf5"),
        _resume,
        (
            *("mopo_fast.run.folder:holds_run", "mopo_fast.run.checkpoint:load_checkpoint"),
            *("mopo_fast.run.folder:is_finished", "mopo_fast.run.folder:lengthen"),
            *("mopo_fast.train:Training.__enter__", "mopo_fast.train:Training.restore"),
            *("mopo_fast.run.resolve:load_data", "mopo_fast.utils.tensors:load_metadata"),
            *("mopo_fast.fit:read_fit", "mopo_fast.run.log:_parse", "mopo_fast.run.log:_whole_lines"),
        ),
    ),
    Entry(
        "train --resume RUN",
        _make_run,
        ("run/config.json",),
        lambda: read_config(Path("run")).validate(),
        ("mopo_fast.run.folder:read_recorded",),
    ),
    Entry(
        "train --resume checkpoint",
        _make_run,
        ("run/checkpoint/*",),
        _resume,
        ("mopo_fast.run.checkpoint:load_checkpoint", "mopo_fast.train:Training.restore"),
    ),
    Entry(
        "rollout from own data",
        _make_run,
        ("run/config.json", "run/checkpoint/*", "data.hdf5"),
        _take_own_data,
        (
            *("mopo_fast.run.find:find_run_dataset", "mopo_fast.run.find:read_data_config"),
            "mopo_fast.run.checkpoint:read_data_sha256",
        ),
    ),
    Entry(
        "train --dynamics-from",
        _make_first,
        ("first/dynamics.*", "first/fit.json", "first/config.json"),
        lambda: _train_on("first"),
        ("mopo_fast.run.dynamics:read_dynamics", "mopo_fast.run.dynamics:check_same_data"),
    ),
    Entry(
        "sweep rows",
        _make_finished,
        ("run/summary.json",),
        _summarise,
        ("mopo_fast.run.folder:read_summary",),
        cost=4,
    ),
    Entry(
        "report",
        _make_finished,
        ("run/*.json", "run/*.csv", "run/dynamics.*"),
        _report,
        ("mopo_fast.report:_Run.config", "mopo_fast.report:_local_dataset"),
        cost=10,
    ),
    Entry(
        "comparison",
        _make_finished,
        ("run/*.json", "run/progress.csv"),
        _compare,
        ("mopo_fast.run.find:_is_run", "mopo_fast.compare:read_result"),
        cost=2,
    ),
    Entry(
        "selection",
        _make_finished,
        ("run/config.json", "run/summary.json", "run/policy.*", "run/dynamics.*"),
        _select,
        ("mopo_fast.select:_load",),
        cost=5,
    ),
    Entry(
        "run settings",
        _make_models,
        ("run/config.json", "run/*.json", "run/*.safetensors"),
        _generate,
        ("mopo_fast.bulk.plan:run_settings", "mopo_fast.bulk.plan:_with_limit"),
    ),
    Entry("fit checkpoint", _make_fit, ("fit.safetensors",), _fit, ("mopo_fast.fit:Fit._restore",)),
    Entry(
        "online training",
        _make_online,
        ("data/online/*/*.safetensors",),
        _go_on_online,
        (
            "mopo_fast.collect.online:OnlineTraining._load",
            "mopo_fast.collect.online:OnlineTraining._restore",
            "mopo_fast.collect.online:OnlineTraining._rows",
        ),
    ),
]


def _train_on(folder: str) -> None:
    log.Board = _Board
    train.write_report = lambda run, **_: Path(run, "report.html")
    train.train(dataclasses.replace(CONFIG, dynamics_from=folder), "out", quiet=True)


# --- Shards


def _generate_shards(**how: Any) -> Manifest:
    data = load_dataset("data.hdf5", quiet=True)
    return generate_shards(
        "run", data, "out", count=20, shard_rows=8, seed=1, threads=1, backend="cpu", quiet=True, **how
    )


def _make_shards(**how: Any) -> Callable[[int], None]:
    def make(number: int) -> None:
        _make_models(number)
        _generate_shards(**how)

    return make


def _make_part(**how: Any) -> Callable[[int], None]:
    """Make shards whose manifest does not list the last one, and of which one is missing."""

    def make(number: int) -> None:
        _make_shards(**how)(number)
        manifest = read_json("out/_manifest.json")
        last = manifest["shards"].pop()
        Path("out", manifest["shards"][0]["file"]).unlink()
        assert Path("out", last["file"]).exists()
        Path("out/_manifest.json").write_text(json.dumps(manifest, indent=2))

    return make


def _read_shards() -> None:
    rollouts = open_rollouts("out")
    for shard in rollouts:
        touch(shard)
    touch(rollouts[::-1])
    touch(next(rollouts.batches(7, seed=1)))
    as_text(summarise(rollouts.manifest))


def _mend() -> None:
    """Update the manifest's digests to the mutated shards, so that checks beyond the digest are reached."""
    with contextlib.suppress(Exception):
        manifest = read_json("out/_manifest.json")
        for record in manifest["shards"]:
            path = Path("out", record["file"])
            algorithm = algorithm_of(record["checksum"])
            record["checksum"], record["bytes"] = file_checksum(path, algorithm), path.stat().st_size
        Path("out/_manifest.json").write_text(json.dumps(manifest, indent=2))


def _verify() -> None:
    if Path("out/_manifest.json").is_file() and not any(
        path.is_fifo() or path.is_symlink() for path in Path("out").iterdir()
    ):
        _mend()
    manifest = verify("out", quiet=True)
    as_text(summarise(manifest))


def _complete(**how: Any) -> Callable[[], None]:
    def complete() -> None:
        _generate_shards(**how)
        _read_shards()

    return complete


SHARDS = (
    "mopo_fast.data.manifest:read_manifest",
    "mopo_fast.data.shards:read_shard",
    "mopo_fast.data.shards:read_file",
)
_PARQUET = {"format": "parquet", "compression": "snappy"}
_SHARDS = [
    Entry("shards", _make_shards(), ("out/*",), _read_shards, SHARDS),
    Entry("shards gzip", _make_shards(compression="gzip"), ("out/*.hdf5",), _read_shards, SHARDS),
    Entry(
        "shards parquet",
        _make_shards(**_PARQUET),
        ("out/*",),
        _read_shards,
        (*SHARDS, "mopo_fast.data.parquet:open_parquet", "mopo_fast.data.parquet:_walk"),
    ),
    Entry("shards as data", _make_shards(), ("out/*",), _load("out"), (*SHARDS, "mopo_fast.data:_load")),
    Entry("convert shards", _make_shards(), ("out/*",), functools.partial(_convert, "out", "x.npz"), SHARDS),
    Entry(
        "shards verify",
        _make_shards(),
        ("out/*",),
        _verify,
        (*SHARDS, "mopo_fast.bulk.read:_verify_shard", "mopo_fast.bulk.files:file_checksum"),
    ),
    Entry(
        "shards verify parquet",
        _make_shards(**_PARQUET),
        ("out/*",),
        _verify,
        ("mopo_fast.bulk.read:_verify_shard",),
    ),
    Entry(
        "shards resume",
        _make_part(),
        ("out/*",),
        _complete(),
        ("mopo_fast.bulk.write:_find_shards", "mopo_fast.bulk.write:_check_belongs"),
    ),
    Entry(
        "shards resume parquet",
        _make_part(**_PARQUET),
        ("out/*",),
        _complete(**_PARQUET),
        ("mopo_fast.bulk.write:_find_shards", "mopo_fast.bulk.write:_check_belongs"),
    ),
    Entry(
        "shards overwrite",
        _make_shards(),
        ("out/_manifest.json",),
        _complete(overwrite=True),
        ("mopo_fast.data.manifest:read_manifest",),
    ),
]


ENTRIES: tuple[Entry, ...] = (*_DATA, *_MODELS, *_COMPAT, *_RUNS, *_SHARDS)
