"""Export a policy and a dynamics ensemble to ONNX or torch.export, for programs without this package.

Each file is compared with the networks in float64 before it gets its name.
"""

import contextlib
import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopo_fast._version import __version__
from mopo_fast.config import EXPORT_FORMATS, ExportFormat
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.run.find import check_run
from mopo_fast.run.folder import holds_run, read_recorded
from mopo_fast.utils.atomic import atomic_path, check_writable

logger = logging.getLogger("mopo_fast")

SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch": ".pt2"}
FOLDER = "export"
"""Folder in a run's folder that receives the files."""

# Rows of the comparison.
_ROWS = 1000
# Most bytes of an ONNX file, which is one message of protobuf.
_LARGEST_ONNX = 2**31 - 2**20
_EPSILON = torch.finfo(torch.float32).eps

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how accurate it is.

    Attributes:
        path: the file.
        model: "policy" or "dynamics".
        error: largest difference between an output of the file and the network in float64.
        usual_error: the same of PyTorch in float32, to which `error` is compared.
    """

    path: Path
    model: str
    error: float
    usual_error: float


class _Policy(nn.Module):
    """The deterministic policy, as it is exported."""

    inputs = ("observations",)

    def __init__(self, actor: Actor, distribution: bool) -> None:
        super().__init__()
        self.actor, self.distribution = actor, distribution
        self.outputs = ("actions", "mean", "log_std") if distribution else ("actions",)

    def forward(self, observations: torch.Tensor) -> Tensors:
        mean, log_std = self.actor(observations)
        actions = torch.tanh(mean)
        return (actions, mean, log_std) if self.distribution else (actions,)


class _Dynamics(nn.Module):
    """The ensemble in raw units, as it is exported."""

    inputs = ("observations", "actions")
    outputs = ("mean", "std")

    def __init__(self, ensemble: EnsembleDynamics) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> Tensors:
        mean, logvar = self.ensemble(torch.cat([observations, actions], dim=-1))
        following = self.ensemble.next_observations(observations, mean)
        return torch.cat([following, mean[..., -1:]], dim=-1), torch.exp(0.5 * logvar)


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    to: ExportFormat = "onnx",
    distribution: bool = False,
    overwrite: bool = False,
) -> list[Exported]:
    """Export the policy and the dynamics of a run, or the one of them that the folder holds.

    The log says if one is missing, and if the run is not finished.

    Args:
        run: folder of a run, of `mopo-fast fit`, or one that `Actor.save` or `EnsembleDynamics.save` wrote.
        out: folder for the files, which are policy.onnx and dynamics.onnx, or policy.pt2 and dynamics.pt2.
            None is `export` in the folder of the run.
        to: "onnx", or "torch" for programs of `torch.export`.
        distribution: let the policy return mean and log_std too, see `export_policy`.
        overwrite: replace files that exist.

    Returns:
        What was written, the policy first.

    Raises:
        InputError: the folder holds neither model, a file of it is damaged, a file to write exists and
            `overwrite` is False, or see `export_policy`.
    """
    run = Path(run)
    check_run(run, files=("policy.json", "dynamics.json"))
    names = [name for name in ("policy", "dynamics") if (run / f"{name}.json").is_file()]
    paths = {name: (run / FOLDER if out is None else Path(out)) / f"{name}{_suffix(to)}" for name in names}
    for path in paths.values():
        _check_file(path, overwrite)
    actor = Actor.load(run) if "policy" in names else None
    ensemble = EnsembleDynamics.load(run) if "dynamics" in names else None
    origin = _origin(run)
    for model, missing in ((actor, "policy"), (ensemble, "dynamics")):
        if model is None:
            logger.info("%s has no %s; the %s is exported alone", run, missing, names[0])
    if holds_run(run) and not (run / "summary.json").is_file():
        logger.info("the run in %s is not finished; its latest models are exported", run)
    written = []
    if actor is not None:
        observations = None
        if ensemble is not None and ensemble.obs_dim == actor.obs_dim:
            observations = draw_inputs(ensemble)[0]
        written.append(
            export_policy(
                actor,
                paths["policy"],
                to=to,
                distribution=distribution,
                observations=observations,
                metadata=origin,
                overwrite=overwrite,
            )
        )
    if ensemble is not None:
        written.append(
            export_dynamics(ensemble, paths["dynamics"], to=to, metadata=origin, overwrite=overwrite)
        )
    return written


def export_policy(
    actor: Actor,
    path: str | os.PathLike[str],
    *,
    to: ExportFormat = "onnx",
    distribution: bool = False,
    observations: torch.Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a policy: observations [batch, obs_dim] in, actions tanh(mean) [batch, act_dim] out, in float32.

    The file is compared with the policy in float64 before it gets its name. Its error may be twice that of
    PyTorch in float32, and one unit in the last place of the largest output more.

    Args:
        actor: the policy.
        path: file to write.
        to: "onnx", or "torch" for a program of `torch.export`.
        distribution: return mean and log_std [batch, act_dim] too, those of the Gaussian before the tanh.
        observations: [n, obs_dim] observations of the comparison; None draws normal ones.
        metadata: texts to store in the file, beside version, sizes and format.
        overwrite: replace the file if it exists.

    Raises:
        InputError: a package is missing, the file exists and `overwrite` is False, it cannot be written, or
            it is not accurate enough.
    """
    if observations is None:
        observations = torch.randn(_ROWS, actor.obs_dim, generator=torch.Generator().manual_seed(0))
    if observations.ndim != 2 or not len(observations) or observations.shape[1] != actor.obs_dim:
        raise InputError(f"observations must be [n, {actor.obs_dim}], got {list(observations.shape)}")
    inputs = (observations.detach().cpu().float(),)
    module = _Policy(copy.deepcopy(actor).cpu(), distribution)
    about = {"obs_dim": str(actor.obs_dim), "act_dim": str(actor.act_dim)}
    return _export(module, inputs, Path(path), to, "policy", metadata, about, overwrite)


def export_dynamics(
    ensemble: EnsembleDynamics,
    path: str | os.PathLike[str],
    *,
    to: ExportFormat = "onnx",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export an ensemble with its standardisation and the bounds of its variances, in float32.

    Inputs are observations [batch, obs_dim] and actions [batch, act_dim]. Outputs are the mean and the
    standard deviation, each [members, batch, obs_dim + 1], of the next observation and the reward, in raw
    units. The elites are in the metadata, as a list in JSON. The file is compared with the ensemble in
    float64, as in `export_policy`, at random inputs of the mean and spread of the data.

    Args:
        ensemble: the dynamics.
        path: file to write.
        to: "onnx", or "torch" for a program of `torch.export`.
        metadata: texts to store in the file, beside version, sizes, elites and format.
        overwrite: replace the file if it exists.

    Raises:
        InputError: as in `export_policy`, or the elites are not members.
    """
    ensemble.check_elites()
    about = {
        "obs_dim": str(ensemble.obs_dim),
        "act_dim": str(ensemble.act_dim),
        "members": str(ensemble.members),
        "elites": json.dumps(ensemble.elites.tolist()),
    }
    module = _Dynamics(copy.deepcopy(ensemble).cpu())
    return _export(module, draw_inputs(ensemble), Path(path), to, "dynamics", metadata, about, overwrite)


def draw_inputs(ensemble: EnsembleDynamics) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw observations [1000, obs_dim] and actions [1000, act_dim] with the data's means and deviations."""
    mean, std = ensemble.input_mean.cpu(), ensemble.input_std.cpu()
    inputs = mean + std * torch.randn(_ROWS, len(mean), generator=torch.Generator().manual_seed(0))
    observations, actions = inputs.split([ensemble.obs_dim, ensemble.act_dim], dim=-1)
    return observations.contiguous(), actions.contiguous()


def _suffix(to: ExportFormat) -> str:
    if to not in EXPORT_FORMATS:
        raise InputError(f"unknown format {to!r}; there are: {', '.join(EXPORT_FORMATS)}")
    return SUFFIXES[to]


def _check_file(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"{path} exists already; choose another --out, or replace it with --overwrite")
    check_writable(path)


def _origin(run: Path) -> dict[str, str]:
    """Return the task, the data set and the seed in a folder's config.json, if there is one."""
    path = run / "config.json"
    if not path.is_file():
        return {}
    recorded = read_recorded(path)
    known = {name: recorded.get(name) for name in ("task", "dataset", "seed")}
    # A path is of this machine alone.
    return {name: Path(str(value)).name for name, value in known.items() if value is not None}


def _export(
    module: _Policy | _Dynamics,
    inputs: Tensors,
    path: Path,
    to: ExportFormat,
    model: str,
    metadata: Mapping[str, str] | None,
    about: Mapping[str, str],
    overwrite: bool,
) -> Exported:
    """Write one model, and rename the file once its outputs agree with the model's."""
    _suffix(to)
    _check_file(path, overwrite)
    packages = _onnx_packages() if to == "onnx" else None
    module.eval().requires_grad_(False)
    size = sum(4 * parameter.numel() for parameter in module.parameters())
    if to == "onnx" and size > _LARGEST_ONNX:
        raise InputError(f"the {model} of {size:,} bytes is too large for an ONNX file; export it to torch")
    stored = {**(metadata or {}), **about, "model": model, "mopo_fast": __version__}
    with atomic_path(path) as temporary:
        temporary.write_bytes(_to_onnx(module, stored) if to == "onnx" else _to_torch(module, stored))
        run = _torch_runner(temporary) if packages is None else _onnx_runner(temporary, module, packages)
        error, usual = _compare(path, module, inputs, run)
    return Exported(path, model, error, usual)


def _onnx_packages() -> Any:
    """Import what ONNX files need, and return onnxruntime.

    Raises:
        InputError: a package is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ONNX files need onnx, onnxscript and onnxruntime ({error}); install them with"
            " `pip install '.[onnx]'` in the checkout"
        ) from None
    return onnxruntime


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what torch's exporters tell of their own code, none of which a user can mend."""
    theirs = logging.getLogger("torch.onnx")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.setLevel(level)


def _example(module: _Policy | _Dynamics) -> tuple[Tensors, dict[str, Any]]:
    """Return inputs to trace a model with, and the declaration that any number of rows may follow."""
    sizes = {"observations": "obs_dim", "actions": "act_dim"}
    model = module.actor if isinstance(module, _Policy) else module.ensemble
    # Two rows, because torch.export takes a single one for a constant.
    rows = tuple(torch.zeros(2, getattr(model, sizes[name])) for name in module.inputs)
    batch = torch.export.Dim("batch", min=1)
    return rows, {name: {0: batch} for name in module.inputs}


def _to_onnx(module: _Policy | _Dynamics, metadata: Mapping[str, str]) -> bytes:
    rows, dims = _example(module)
    with _quiet():
        program = torch.onnx.export(
            module,
            rows,
            dynamo=True,
            dynamic_shapes=dims,
            input_names=list(module.inputs),
            output_names=list(module.outputs),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    content: bytes = program.model_proto.SerializeToString()
    return content


def _to_torch(module: _Policy | _Dynamics, metadata: Mapping[str, str]) -> bytes:
    rows, dims = _example(module)
    buffer = io.BytesIO()
    with _quiet():
        program = torch.export.export(module, rows, dynamic_shapes=dims)
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return buffer.getvalue()


def _onnx_runner(
    path: Path, module: _Policy | _Dynamics, onnxruntime: Any
) -> Callable[[Tensors], Sequence[torch.Tensor]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Tensors) -> list[torch.Tensor]:
        named = {name: rows.numpy() for name, rows in zip(module.inputs, inputs, strict=True)}
        return [torch.from_numpy(values) for values in session.run(list(module.outputs), named)]

    return run


def _torch_runner(path: Path) -> Callable[[Tensors], Sequence[torch.Tensor]]:
    # torch.export.load may unpickle. `_export` has just written this file.
    with _quiet():
        program = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return lambda inputs: program(*inputs)


@torch.no_grad()
def _compare(
    path: Path,
    module: _Policy | _Dynamics,
    inputs: Tensors,
    run: Callable[[Tensors], Sequence[torch.Tensor]],
) -> tuple[float, float]:
    """Return the largest error of a file and of PyTorch in float32, both against float64.

    Raises:
        InputError: in a column of an output, the error is more than twice PyTorch's and one unit in the last
            place of the column's largest value.
    """
    exact = copy.deepcopy(module).double()(*(rows.double() for rows in inputs))
    same = module(*inputs)
    # The last row is alone in a call, as a policy's often is.
    calls = [run(inputs), run(tuple(rows[-1:] for rows in inputs))]
    largest = largest_usual = 0.0
    for name, truth, ours, *found in zip(module.outputs, exact, same, *calls, strict=True):
        # Columns have units of their own.
        error, usual = (
            torch.stack([_column_errors(part, truth) for part in parts]).amax(0) for parts in (found, [ours])
        )
        allowed = 2.0 * usual + _EPSILON * truth.abs().flatten(0, -2).amax(0)
        # A comparison with NaN is False.
        wrong = ~(error <= allowed)
        if bool(wrong.any()):
            column = int(wrong.nonzero()[0, 0])
            raise InputError(
                f"{path} was not written: column {column} of its output {name} differs from the model by"
                f" {float(error[column]):.3g}, and {float(allowed[column]):.3g} is allowed; choose the other"
                " format, or other versions of torch, onnxscript and onnxruntime"
            )
        largest, largest_usual = max(largest, float(error.max())), max(largest_usual, float(usual.max()))
    return largest, largest_usual


def _column_errors(values: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the largest error of each column of [..., rows, columns], whose rows are the truth's last."""
    return (values.double() - truth[..., -values.shape[-2] :, :]).abs().flatten(0, -2).amax(0)
