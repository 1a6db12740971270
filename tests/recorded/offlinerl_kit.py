"""Record results and files of OfflineRL-Kit itself: `python tests/recorded/offlinerl_kit.py CHECKOUT`.

Made with commit e3ce697, torch 2.13.0, NumPy 2.4.6.
"""

import copy
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

from mopo_fast.backends.philox import ACTION_STREAM, NEXT_ACTION_STREAM, NOISE_STREAM, random_normals

OBS, ACT, MEMBERS, ELITES, HIDDEN = 3, 2, 4, 3, (8, 6)
OUT = Path(__file__).with_suffix("")
# Members say different things of the first dimension, so that a sample shows which was drawn.
APART = 3.0
# Updates that are recorded, the rows of each, and those that come from the data and from the model.
UPDATES, ROWS = 6, 40
PARTS = {"real": slice(0, 5), "fake": slice(5, ROWS)}
# Samples of MOBILE's penalty.
SAMPLES = 4


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    for name in ("gym", "gym.envs", "gym.envs.mujoco"):
        sys.modules[name] = MagicMock()
    from offlinerlkit.dynamics import EnsembleDynamics
    from offlinerlkit.modules import ActorProb, Critic, EnsembleDynamicsModel, TanhDiagGaussian
    from offlinerlkit.nets import MLP
    from offlinerlkit.policy import MOPOPolicy
    from offlinerlkit.utils import termination_fns
    from offlinerlkit.utils.scaler import StandardScaler

    torch.manual_seed(0)
    np.random.seed(0)
    model = EnsembleDynamicsModel(OBS, ACT, HIDDEN, MEMBERS, ELITES, weight_decays=[1e-4] * 3)
    with torch.no_grad():
        for layer in (*model.backbones, model.output_layer):
            layer.bias.normal_(0.0, 0.3)
        model.output_layer.bias[:, 0, 0] = APART * torch.arange(MEMBERS)
        model.output_layer.bias[:, 0, OBS + 1] = -6.0
        model.max_logvar.uniform_(-0.5, 0.5)
        model.min_logvar.uniform_(-7.0, -5.0)
    model.update_save(list(range(MEMBERS)))
    model.set_elites([3, 0, 2])
    observations = np.random.normal(size=(32, OBS)).astype(np.float32)
    actions = np.tanh(np.random.normal(size=(32, ACT))).astype(np.float32)
    scaler = StandardScaler()
    scaler.fit(np.concatenate([observations, actions], 1))
    recorded = {"observations": observations, "actions": actions}

    def dynamics(mode: str) -> EnsembleDynamics:
        return EnsembleDynamics(model, None, scaler, termination_fns.termination_fn_point2denv, 0.7, mode)

    inputs = scaler.transform(np.concatenate([observations, actions], 1))
    with torch.no_grad():
        mean, logvar = model(inputs)
    recorded |= {"mean": mean.numpy(), "logvar": logvar.numpy()}
    for mode in ("aleatoric", "pairwise-diff", "ensemble_std"):
        *_, info = dynamics(mode).step(observations, actions)
        recorded[f"penalty {mode}"] = info["penalty"]
    many = [np.repeat(array[:1], 2000, axis=0) for array in (observations, actions)]
    next_obs, _, _, info = dynamics("aleatoric").step(*many)
    recorded["samples"] = np.concatenate([next_obs, info["raw_reward"]], 1)

    # Around every bound of every rule, of as many dimensions as the widest needs.
    states = np.random.uniform(-3.0, 3.0, size=(160, 27)).astype(np.float32)
    # No rule ends these, so that the one value beside a bound decides.
    states[:120] = 0.0
    states[:120, [0, 26]] = 1.0
    edges = np.float32([-100, 100, 0.7, -0.2, 0.2, 0.8, 2.0, -1.0, 1.0, 0.075])
    beside = [np.nextafter(edges, np.float32(far)) for far in (-1e9, 1e9)]
    edges = np.concatenate([edges, *beside])
    for row, value in enumerate(np.repeat(edges, 4)):
        states[row, [0, 1, 5, 26][row % 4]] = value
    recorded["states"] = states
    for name in ("halfcheetah", "hopper", "walker2d", "ant", "antangle", "humanoid", "pen", "pendulum"):
        function = getattr(termination_fns, f"termination_fn_{name}")
        recorded[f"ended {name}"] = function(states, np.zeros((160, 2)), states).astype(bool)

    actor = ActorProb(
        MLP(OBS, HIDDEN), TanhDiagGaussian(HIDDEN[-1], ACT, unbounded=True, conditioned_sigma=True)
    )
    critics = [Critic(MLP(OBS + ACT, HIDDEN)) for _ in range(2)]
    policy = MOPOPolicy(dynamics("aleatoric"), actor, *critics, None, None, None)
    with torch.no_grad():
        # Both ends of the clip are met.
        actor.dist_net.sigma.weight.mul_(40.0)
    recorded["deterministic"] = policy.select_action(observations, deterministic=True)
    distribution = actor(observations)
    recorded["policy std"] = distribution.scale.detach().numpy()

    OUT.mkdir(exist_ok=True)
    record_updates(policy)
    record_mobile(policy)
    dynamics("aleatoric").save(str(OUT))
    torch.save(policy.state_dict(), OUT / "policy.pth")
    np.savez_compressed(OUT / "recorded.npz", **recorded)


class Recorded:
    """The noise of mopo_fast's kernels in the place of torch's."""

    def __init__(self, noise) -> None:
        self.normal, self.uniform = torch.distributions.Normal.rsample, torch.randn_like
        self.noise = list(noise)
        torch.distributions.Normal.rsample = lambda normal: normal.loc + normal.scale * self.noise.pop(0)
        torch.randn_like = lambda like: self.noise.pop(0)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        torch.distributions.Normal.rsample, torch.randn_like = self.normal, self.uniform
        assert not self.noise


def optimizers_of(policy, networks) -> None:
    """Give a policy optimizers and an automatic temperature, as run_mopo.py does."""
    log_alpha = torch.zeros(1, requires_grad=True)
    for name, network in networks.items():
        rate = 3e-3 if name == "actor" else 1e-2
        setattr(policy, f"{name}_optim", torch.optim.Adam(network.parameters(), lr=rate))
    policy._is_auto_alpha, policy._target_entropy, policy._log_alpha = True, 4.0, log_alpha
    policy._alpha, policy._tau, policy._gamma = log_alpha.detach().exp(), 0.1, 0.9
    policy.alpha_optim = torch.optim.Adam([log_alpha], lr=1e-2)


def batches() -> dict:
    random = np.random.default_rng(0)
    arrays = {
        "observations": random.normal(size=(UPDATES, ROWS, OBS)),
        "actions": np.tanh(random.normal(size=(UPDATES, ROWS, ACT))),
        "next_observations": random.normal(size=(UPDATES, ROWS, OBS)),
        "rewards": random.normal(size=(UPDATES, ROWS, 1)),
        "terminals": random.random((UPDATES, ROWS, 1)) < 0.2,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def learn(policy, recorded, noise_of, path, networks) -> None:
    """Update a policy on the recorded batches, and write the results to a file."""
    with torch.no_grad():
        # Some actions come so close to the bounds that the 1e-6 in the log-probabilities counts.
        policy.actor.dist_net.sigma.weight.div_(40.0)
        policy.actor.dist_net.mu.bias.copy_(torch.tensor([3.0, -1.0]))
    optimizers_of(policy, networks)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(policy.actor_optim, UPDATES)
    before = {f"before {name}": value.numpy().copy() for name, value in policy.state_dict().items()}
    losses = []
    for update in range(UPDATES):
        batch = {name: torch.from_numpy(array[update]) for name, array in recorded.items()}
        parts = {name: {key: value[part] for key, value in batch.items()} for name, part in PARTS.items()}
        with Recorded(noise_of(update)):
            losses.append(policy.learn(parts))
        schedule.step()
    recorded = (
        recorded | before | {f"loss {name}": np.array([one[name] for one in losses]) for name in losses[0]}
    )
    recorded["log_alpha"] = policy._log_alpha.detach().numpy()
    for name, value in policy.state_dict().items():
        recorded[f"after {name}"] = value.numpy()
    for name, network in networks.items():
        state = getattr(policy, f"{name}_optim").state
        for key, parameter in network.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                recorded[f"{moment} {name}.{key}"] = state[parameter][moment].numpy()
    np.savez_compressed(path, **recorded)


def update_noise(seed: int) -> list[torch.Tensor]:
    """Return the kernel's noise of one update: at the next observations, then at the observations."""
    rows, zeros = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    return [
        random_normals(rows, zeros, stream, ACT, seed, torch.float32)
        for stream in (NEXT_ACTION_STREAM, ACTION_STREAM)
    ]


def penalty_noise(seed: int) -> list[torch.Tensor]:
    """Return the kernel's noise of MOBILE's penalty: of each sample's states, then of all actions.

    The original computes penalties of the real rows too, which it does not use.
    """
    first = PARTS["fake"].start
    fake = ROWS - first
    rows = torch.arange(SAMPLES * ELITES * fake)

    def draw(stream: int, width: int) -> torch.Tensor:
        noise = torch.zeros(SAMPLES, ELITES, ROWS, width)
        made = random_normals(rows, 0, stream, width, seed, torch.float32)
        noise[:, :, first:] = made.view(SAMPLES, ELITES, fake, width)
        return noise

    # The last dimension is the reward's.
    states = torch.nn.functional.pad(draw(NOISE_STREAM, OBS), (0, 1))
    return [*states, draw(ACTION_STREAM, ACT).view(-1, ACT)]


def record_updates(policy) -> None:
    """Write what MOPOPolicy.learn makes of a copy of `policy`."""
    policy = copy.deepcopy(policy)
    networks = {"actor": policy.actor, "critic1": policy.critic1, "critic2": policy.critic2}
    learn(policy, batches(), update_noise, OUT / "learn.npz", networks)


def record_mobile(policy) -> None:
    """Write what MOBILEPolicy.learn makes of copies of the networks of a MOPOPolicy."""
    from offlinerlkit.policy import MOBILEPolicy

    policy = copy.deepcopy(policy)
    critics = torch.nn.ModuleList([policy.critic1, policy.critic2])
    mobile = MOBILEPolicy(
        policy.dynamics, policy.actor, critics, None, None,
        penalty_coef=0.7, num_samples=SAMPLES, deterministic_backup=True,
    )  # fmt: skip

    def noise(update: int) -> list[torch.Tensor]:
        return [*penalty_noise(2 * update), *update_noise(2 * update + 1)]

    learn(mobile, batches(), noise, OUT / "learn_mobile.npz", {"actor": mobile.actor, "critics": critics})


if __name__ == "__main__":
    main(sys.argv[1])
