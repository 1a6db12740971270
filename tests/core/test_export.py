"""Test exported models: other programs compute what the networks do, and a wrong file is refused."""

import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT

from mopo_fast import __version__
from mopo_fast import export as exporting
from mopo_fast.config import ExportFormat
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.export import draw_inputs, export_dynamics, export_policy, export_run
from mopo_fast.policy import Actor
from mopo_fast.rollout import RolloutEngine

RUN = ROOT / "tests" / "recorded" / "version_0_1_0" / "finished"
FORMATS = ["onnx", "torch"]
# Ensembles of this package's fit and of other code.
KINDS: dict[str, dict[str, Any]] = {
    "own": {},
    "layer norms": {"layer_norm": True},
    "std": {"log_scale": "std", "max_logvar": 0.0, "min_logvar": -3.0, "activation": "relu"},
    "bounds of members": {"member_bounds": True, "activation": "tanh"},
    "absolute": {"absolute": [0, 3]},
    "linear, one member": {"hidden": (), "members": 1, "elites": 1},
}


@pytest.fixture
def needs(to: ExportFormat) -> None:
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


def ensemble_of(kind: str) -> EnsembleDynamics:
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"members": 3, "elites": 2, "hidden": (16, 16)} | KINDS[kind]
    ensemble = EnsembleDynamics(5, 2, **options, generator=generator)
    with torch.no_grad():
        for tensor in (*ensemble.biases, ensemble.max_logvar, ensemble.min_logvar):
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        ensemble.input_mean.copy_(torch.randn(7, generator=generator))
        ensemble.input_std.copy_(torch.rand(7, generator=generator) * 5.0 + 0.1)
        ensemble.elites.copy_(torch.arange(ensemble.members).flip(0)[: len(ensemble.elites)])
    return ensemble


def actor_of(activation: str = "relu") -> Actor:
    generator = torch.Generator().manual_seed(5)
    return Actor(5, 2, hidden=(16, 8), activation=activation, log_std_min=-1.0, generator=generator)


def call(path: Path, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, str]]:
    """Run an exported file as another program would; return its outputs and its metadata."""
    if path.suffix == ".onnx":
        import onnx
        import onnxruntime

        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert {each.shape[-2] for each in (*session.get_inputs(), *session.get_outputs())} == {"batch"}
        names = [each.name for each in session.get_inputs()]
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        return [torch.from_numpy(x) for x in outputs], session.get_modelmeta().custom_metadata_map
    extra = {"metadata.json": ""}
    program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    return list(program.module()(*inputs)), json.loads(extra["metadata.json"])


@pytest.mark.usefixtures("needs")
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_dynamics_predict_what_the_reference_backend_does(
    to: ExportFormat, kind: str, tmp_path: Path
) -> None:
    ensemble = ensemble_of(kind)
    path = tmp_path / f"dynamics{exporting.SUFFIXES[to]}"
    written = export_dynamics(ensemble, path, to=to, metadata={"task": "cart"})
    assert (written.path, written.model) == (path, "dynamics") and 0 < written.error < 1e-3
    engine = RolloutEngine(ensemble, backend="reference", dtype="float64")
    observations, actions = draw_inputs(ensemble)
    for rows in (1000, 7, 1):
        inputs = observations[:rows], actions[:rows]
        (mean, std), metadata = call(path, *inputs)
        result = engine.step(*(x.double() for x in inputs), seed=0, distributions=True)
        assert mean.shape == std.shape == (ensemble.members, rows, 6)
        # The engine's means are the networks' own outputs.
        following = ensemble.double().next_observations(inputs[0].double(), result.mean)
        ensemble.float()
        expected = torch.cat([following, result.mean[..., -1:]], -1)
        for found, exact in ((mean, expected), (std, result.std)):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert json.loads(metadata["elites"]) == ensemble.elites.tolist()
    assert metadata["members"] == str(ensemble.members) and metadata["task"] == "cart"
    assert (metadata["obs_dim"], metadata["act_dim"]) == ("5", "2")


@pytest.mark.usefixtures("needs")
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("distribution", [False, True])
def test_a_policy_acts_as_the_actor(to: ExportFormat, distribution: bool, tmp_path: Path) -> None:
    actor, path = actor_of("silu"), tmp_path / "deep" / f"policy{exporting.SUFFIXES[to]}"
    export_policy(actor, path, to=to, distribution=distribution)
    observations = 3.0 * torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    for rows in (50, 1):
        outputs, metadata = call(path, observations[:rows])
        expected = [torch.from_numpy(actor.predict(observations[:rows])), *actor(observations[:rows])]
        assert len(outputs) == (3 if distribution else 1)
        for found, exact in zip(outputs, expected, strict=False):
            torch.testing.assert_close(found, exact.detach(), rtol=1e-5, atol=1e-6)
    assert metadata["model"] == "policy" and metadata["mopo_fast"] == __version__
    assert actor.weights[0].requires_grad


@pytest.mark.usefixtures("needs")
@pytest.mark.parametrize("to", FORMATS)
def test_a_saturated_policy_is_exported(to: ExportFormat, tmp_path: Path) -> None:
    actor = actor_of()
    with torch.no_grad():
        actor.weights[-1] *= 1000.0
    path = tmp_path / f"policy{exporting.SUFFIXES[to]}"
    export_policy(actor, path, to=to)
    (actions,), _ = call(path, torch.ones(4, 5))
    assert float(actions.abs().min()) > 0.9 and float(actions.abs().max()) <= 1.0


@pytest.mark.usefixtures("needs")
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("change", [1e-5, float("nan")])
def test_a_file_that_computes_something_else_is_refused(
    to: ExportFormat, change: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = getattr(exporting, f"_to_{to}")

    def wrong(module: Any, metadata: Any) -> bytes:
        with torch.no_grad():
            module.ensemble.biases[-1][1, -1] += change
            content: bytes = write(module, metadata)
            module.ensemble.biases[-1][1, -1] = kept
        return content

    ensemble = ensemble_of("own")
    kept = ensemble.biases[-1][1, -1].detach().clone()
    monkeypatch.setattr(exporting, f"_to_{to}", wrong)
    path = tmp_path / f"dynamics{exporting.SUFFIXES[to]}"
    with pytest.raises(InputError, match=r"was not written: column 5 of its output std differs from the mod"):
        export_dynamics(ensemble, path, to=to)
    assert not list(tmp_path.iterdir())


def test_an_error_at_one_row_or_in_a_call_of_one_row_is_found(tmp_path: Path) -> None:
    module, inputs = exporting._Policy(actor_of(), True), (torch.randn(20, 5),)

    def wrong_at(length: int) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
        def run(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            outputs = [output.clone() for output in module(*rows)]
            if len(rows[0]) == length:
                outputs[1][-1, 0] += 1e-4
            return outputs

        return run

    for length in (20, 1):
        with pytest.raises(InputError, match="column 0 of its output mean differs"):
            exporting._compare(tmp_path, module, inputs, wrong_at(length))
    assert exporting._compare(tmp_path, module, inputs, wrong_at(0))[0] > 0


@pytest.mark.usefixtures("needs")
@pytest.mark.parametrize("to", FORMATS)
def test_a_run_is_exported(to: ExportFormat, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    with caplog.at_level(logging.INFO, "mopo_fast"):
        written = export_run(run, to=to)
    assert not caplog.messages
    suffix = exporting.SUFFIXES[to]
    assert [file.path for file in written] == [
        run / "export" / f"{name}{suffix}" for name in ("policy", "dynamics")
    ]
    (actions,), metadata = call(written[0].path, torch.zeros(1, 11))
    np.testing.assert_allclose(actions[0], Actor.load(run).predict(np.zeros(11)), rtol=1e-5, atol=1e-6)
    assert metadata["task"] == "hopper" and metadata["dataset"] == "hopper-random-local.hdf5"


def test_files_are_replaced_on_request(tmp_path: Path) -> None:
    kept = tmp_path / "dynamics.pt2"
    kept.write_text("mine")
    with pytest.raises(InputError, match=r"dynamics.pt2 exists already.*--overwrite"):
        export_run(RUN, tmp_path, to="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["dynamics.pt2"] and kept.read_text() == "mine"
    export_run(RUN, tmp_path, to="torch", overwrite=True)
    call(kept, torch.zeros(1, 11), torch.zeros(1, 3))


@pytest.mark.parametrize(("missing", "only"), [("policy", "dynamics"), ("dynamics", "policy")])
def test_a_folder_with_one_model_says_so(
    missing: str, only: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copy(RUN / f"{only}{suffix}", tmp_path)
    # As `mopo-fast fit` records its settings.
    (tmp_path / "config.json").write_text('{"dataset": "hopper-random-local", "task": "hopper"}')
    with caplog.at_level(logging.INFO, "mopo_fast"):
        (written,) = export_run(tmp_path, to="torch")
    assert caplog.messages == [f"{tmp_path} has no {missing}; the {only} is exported alone"]
    assert written.path == tmp_path / "export" / f"{only}.pt2"


def test_a_run_that_is_not_finished_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    (run / "summary.json").unlink()
    with caplog.at_level(logging.INFO, "mopo_fast"):
        export_run(run, tmp_path / "out", to="torch")
    assert caplog.messages == [f"the run in {run} is not finished; its latest models are exported"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"policy.pt2", "dynamics.pt2"}
    with pytest.raises(InputError, match="holds none of"):
        export_run(tmp_path / "out")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"onnx, onnxscript and onnxruntime.*pip install '\.\[onnx\]'"):
        export_policy(actor_of(), tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0, 5), (3, 4), (5,)])
def test_observations_of_another_size_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"observations must be \[n, 5\]"):
        export_policy(actor_of(), tmp_path / "policy.pt2", to="torch", observations=torch.ones(shape))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format 'jit'; there are: onnx, torch"):
        export_policy(actor_of(), tmp_path / "policy.jit", to="jit")  # type: ignore[arg-type]
