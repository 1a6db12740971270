"""The MBPO loop of mbrl-lib as shipped, with our ModelEnv, with MOPO's penalty, and with our SAC updates.

Data and networks are random, of halfcheetah's sizes. The rollout is
`rollout_model_and_populate_sac_buffer`; the updates are those of its SAC, by `update_parameters`, or by one
call of `update_many`.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.compat import in_every_way
from examples.mbrl_lib import make_agent, make_buffers, make_model
from mopo_fast.compat import mbrl_lib
from mopo_fast.data.transitions import Transitions
from mopo_fast.environments import make_environment
from mopo_fast.tasks import TASKS

HORIZON = 5


def contenders(
    _: Path | None, *, batch_size: int, updates: int, **options: Any
) -> dict[str, Callable[[], object]]:
    """Return calls by name; each is a rollout of 5 steps, or an epoch: a rollout and `updates` of its own."""
    import mbrl.models
    from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer
    from mbrl.env.termination_fns import no_termination
    from mbrl.planning.sac_wrapper import SACAgent

    torch.manual_seed(0)
    env = make_environment(TASKS["halfcheetah"].env_id)
    data = _noise(10_000, env.observation_space.shape[0], env.action_space.shape[0])
    real, fake = make_buffers(data, HORIZON * batch_size)
    model = make_model(data.obs_dim, data.act_dim)
    model.update_normalizer(real.get_all())
    theirs = make_agent(env)
    fused = mbrl_lib.fuse_sac(make_agent(env), **options)
    ours = mbrl_lib.ModelEnv(env, model, no_termination, **options)
    penalised = mbrl_lib.ModelEnv(env, model, no_termination, penalty_coef=1.0, **options)

    def roll_out(model_env: Any, sac: Any = theirs) -> None:
        agent = SACAgent(sac)
        rollout_model_and_populate_sac_buffer(model_env, real, agent, fake, True, HORIZON, batch_size)

    def epoch(model_env: Any, sac: Any = theirs) -> None:
        roll_out(model_env, sac)
        for update in range(updates):
            sac.update_parameters(fake, 256, update, reverse_mask=True)

    def epoch_at_once() -> None:
        roll_out(ours, fused)
        fused.update_many(fake, 256, 0, updates, reverse_mask=True)

    calls = {"rollout": roll_out, "epoch": epoch}
    ways = {
        "as shipped": mbrl.models.ModelEnv(env, model, no_termination),
        "ModelEnv": ours,
        "ModelEnv, penalised": penalised,
    }
    return {
        **in_every_way(calls, ways),
        "epoch, ModelEnv and fuse_sac": functools.partial(epoch, ours, fused),
        "epoch, ModelEnv and fuse_sac, many updates at once": epoch_at_once,
    }


def _noise(count: int, obs_dim: int, act_dim: int) -> Transitions:
    random = np.random.default_rng(0)
    return Transitions(
        *(
            torch.from_numpy(random.uniform(-1, 1, size=size).astype(np.float32))
            for size in ((count, obs_dim), (count, act_dim), (count,), (count, obs_dim))
        ),
        terminals=torch.zeros(count, dtype=torch.bool),
    )
