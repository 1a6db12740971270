"""Test recorded launches, training and the model as an environment on a GPU against the CPU."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import assert_trained_alike, make_ensemble, random_transitions, to_double

from mopo_fast.buffer import RingBuffer
from mopo_fast.config import DynamicsConfig, EvaluationConfig, RolloutConfig, SACConfig, TrainConfig
from mopo_fast.fit import Fit
from mopo_fast.model_env import ModelVectorEnv
from mopo_fast.rollout import RolloutEngine
from mopo_fast.run.population import FitPopulation, SacPopulation, fit_and_save_many, train_many
from mopo_fast.sac import SAC
from mopo_fast.train import train
from mopo_fast.utils.cuda_graphs import Graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

OBS, ACT = 5, 2
CONFIG = SACConfig(hidden=(24, 24), batch_size=32, actor_schedule="cosine")
FIT = DynamicsConfig(
    members=3, elites=2, hidden=(16, 12), weight_decay=(1e-3, 2e-3, 3e-3), batch_size=32, max_epochs=3
)


def test_a_graph_plays_what_it_recorded() -> None:
    total, added = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")

    def add(x: torch.Tensor) -> torch.Tensor:
        total.add_(x).add_(added)
        return total * 2

    graph = Graph(add, [torch.zeros(3, device="cuda")], [total])
    assert total.tolist() == [0.0] * 3
    assert graph(torch.full((3,), 4.0, device="cuda")).tolist() == [10.0] * 3
    added.fill_(3.0)
    graph(torch.full((3,), 1.0, device="cuda"))
    assert total.tolist() == [9.0] * 3


def sources(runs: int, device: str) -> tuple[object, list[RingBuffer]]:
    buffers = [RingBuffer(40, OBS, ACT, device) for _ in range(runs)]
    for i, buffer in enumerate(buffers):
        buffer.append(random_transitions(40, OBS, ACT, seed=2 + i).to(device))
    return random_transitions(30, OBS, ACT, seed=1).to(device), buffers


@pytest.mark.parametrize("runs", [1, 3])
def test_sac_from_a_graph_is_as_accurate_as_on_the_cpu(runs: int) -> None:
    """The second call replays the recorded graph; the updates fill more than one graph, with a remainder."""

    def trained(device: str, double: bool) -> list[dict[str, torch.Tensor]]:
        sacs = [
            SAC(OBS, ACT, CONFIG, seed=i, device=device, backend="reference", total_updates=500)
            for i in range(runs)
        ]
        if double:
            sacs = [to_double(sac) for sac in sacs]
        population, (data, buffers) = SacPopulation(sacs), sources(runs, device)
        for call in range(2):
            population.update_many(data, buffers, 103, [call * runs + i for i in range(runs)])
        assert [sac.updates for sac in sacs] == [206] * runs
        return [{name: value.cpu() for name, value in sac.state().items()} for sac in sacs]

    kernel, same, exact = trained("cuda", False), trained("cpu", False), trained("cpu", True)
    for i in range(runs):
        before = SAC(OBS, ACT, CONFIG, seed=i, backend="reference", total_updates=500).state()
        names = [name for name in exact[i] if name != "updates" and not name.endswith(".step")]
        assert_trained_alike(
            *({name: state[name] for name in names} for state in (kernel[i], same[i], exact[i], before)),
            one_step=False,
        )
        assert all(torch.equal(kernel[i][name], exact[i][name]) for name in exact[i].keys() - names)


def test_a_fit_from_a_graph_is_as_good_as_on_the_cpu(tmp_path: Path) -> None:
    data = random_transitions(3000, 3, 2, seed=0)
    losses = {}
    for device in ("cpu", "cuda"):
        fits = [Fit(data, seed, FIT, device, "reference") for seed in range(2)]
        population = FitPopulation(fits)
        records = [population.run_epoch() for _ in range(3)]
        losses[device] = torch.tensor([[record.train_loss for record in some] for some in records])
        saved = fit_and_save_many(
            data,
            [tmp_path / device / str(seed) for seed in range(2)],
            seeds=range(2),
            config=FIT,
            device=device,
            backend="reference",
        )
        for fit, (model, record) in zip(fits, saved, strict=True):
            assert record["train_loss"] == pytest.approx([epoch.train_loss for epoch in fit.history])
            assert model.input_mean.device.type == device
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=1e-3, atol=1e-3)


def test_on_the_gpu_every_member_sees_its_rows_in_a_new_order() -> None:
    fit = Fit(random_transitions(500, 3, 2, seed=0), 0, FIT, "cuda", "reference")
    first, second = (fit.shuffled(epoch).cpu() for epoch in range(2))
    assert torch.equal(first, fit.shuffled(0).cpu()) and not torch.equal(first, second)
    for order in (first, second):
        assert torch.equal(order.sort(1).values, torch.from_numpy(fit.bootstrap()).sort(1).values)


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_runs_on_the_gpu_can_be_stopped_and_gone_on_with(
    hopper_data: Path, tmp_path: Path, backend: str
) -> None:
    """Two runs train together from data to report; then one of them is resumed alone."""
    config = TrainConfig(
        dataset=str(hopper_data),
        device="cuda",
        backend=backend,
        steps=40,
        dynamics=DynamicsConfig(
            members=3, elites=2, hidden=(16, 16), weight_decay=(1e-5,) * 3, max_epochs=2, batch_size=64
        ),
        rollout=RolloutConfig(
            horizon=3, batch_size=60, interval=10, dtype="float32" if backend == "auto" else "float16"
        ),
        sac=SACConfig(hidden=(16, 16), batch_size=32),
        evaluation=EvaluationConfig(episodes=2, interval=2),
    )
    configs = [dataclasses.replace(config, seed=seed) for seed in range(2)]
    outs = [tmp_path / str(seed) for seed in range(2)]
    summaries = train_many(configs, outs, quiet=True)
    assert [summary["device"] for summary in summaries] == ["cuda"] * 2
    assert all(json.loads((out / "summary.json").read_text())["updates"] == 40 for out in outs)
    for out in outs:
        (out / "summary.json").unlink()
    again = train(configs[0], outs[0], resume=True, quiet=True)
    assert again["score_mean"] == summaries[0]["score_mean"]


def test_the_model_as_an_environment_moves_its_arrays() -> None:
    """NumPy goes in and comes out; some environments end early, so that a step is of a part of the rows."""
    made = {}
    for device in ("cpu", "cuda"):
        engine = RolloutEngine(make_ensemble(OBS, ACT).to(device), backend="reference")
        starts = random_transitions(30, OBS, ACT, seed=1).to(device)
        envs = ModelVectorEnv(engine, starts, num_envs=6, horizon=3, seed=0)
        actions = np.random.default_rng(1).uniform(-1, 1, (8, 6, ACT)).astype(np.float32)
        envs.reset()
        steps = [envs.step(actions[0])]
        envs.reset(options={"reset_mask": np.arange(6) < 2})
        made[device] = [*steps, *(envs.step(action) for action in actions[1:])]
    for ours, theirs in zip(made["cuda"], made["cpu"], strict=True):
        for one, other in zip(ours[:-1], theirs[:-1], strict=True):
            assert isinstance(one, np.ndarray) and one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(ours[-1]["member"], theirs[-1]["member"])
