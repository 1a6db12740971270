"""The MBPO loop of mbrl-lib as shipped, with our ModelEnv, and with our ModelEnv and MOPO's penalty.

Data and networks are random, of halfcheetah's sizes. The rollout is
`rollout_model_and_populate_sac_buffer`; the updates are those of its SAC.
"""

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
    sac = make_agent(env)
    agent = SACAgent(sac)
    ways = {
        "as shipped": mbrl.models.ModelEnv(env, model, no_termination),
        "ModelEnv": mbrl_lib.ModelEnv(env, model, no_termination, **options),
        "ModelEnv, penalised": mbrl_lib.ModelEnv(env, model, no_termination, penalty_coef=1.0, **options),
    }

    def roll_out(model_env: Any) -> None:
        rollout_model_and_populate_sac_buffer(model_env, real, agent, fake, True, HORIZON, batch_size)

    def epoch(model_env: Any) -> None:
        roll_out(model_env)
        for update in range(updates):
            sac.update_parameters(fake, 256, update, reverse_mask=True)

    calls = {"rollout": roll_out, "epoch": epoch}
    return in_every_way(calls, ways)


def _noise(count: int, obs_dim: int, act_dim: int) -> Transitions:
    random = np.random.default_rng(0)
    return Transitions(
        *(
            torch.from_numpy(random.uniform(-1, 1, size=size).astype(np.float32))
            for size in ((count, obs_dim), (count, act_dim), (count,), (count, obs_dim))
        ),
        terminals=torch.zeros(count, dtype=torch.bool),
    )
