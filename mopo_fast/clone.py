"""Behavior cloning: a policy that acts as a data set does."""

import logging
import math

import torch

from mopo_fast.backends.checked import check_range
from mopo_fast.data import Transitions
from mopo_fast.errors import InputError
from mopo_fast.policy import Actor
from mopo_fast.utils.adam import Adam
from mopo_fast.utils.seeds import CLONE, derive_seed

logger = logging.getLogger("mopo_fast")

# Largest size of an action before it is turned back through tanh, which reaches 1 at infinity.
_LARGEST_ACTION = 0.999
_MOST = 1.0 + 1e-5  # a rounded bound is no mistake
# Lowest log standard deviation. Below it the likelihood of a deterministic policy would have no bound.
_LOG_STD_MIN = -5.0
# Rows of a batch: a share of all, so that an epoch of a small data set makes enough updates, within bounds.
_BATCH_SHARE, _LEAST_BATCH, _MOST_BATCH = 1 / 40, 32, 1024
_LEARNING_RATE = 1e-3
# Share of the rows that are held out, the most of them, and epochs without progress on them that end the fit.
_HOLDOUT, _MOST_HELD_OUT, _PATIENCE = 0.1, 20_000, 3
_FEWEST_ROWS = 10


def clone_policy(
    data: Transitions, *, seed: int = 0, hidden: tuple[int, ...] = (256, 256), epochs: int = 50
) -> Actor:
    """Fit a policy to the actions of a data set by maximum likelihood.

    The policy is a Gaussian before the tanh, so its noise is that of the data: sample its actions to compare
    it with them. Where the data come from several policies it is a compromise of them. A tenth of the rows,
    20,000 at most, is held out. The fit ends after three epochs that do not raise their likelihood, and
    returns the best epoch's policy.

    Args:
        data: n >= 10 transitions with finite observations [n, obs_dim] and actions [n, act_dim] in [-1, 1].
            Actions are clipped to [-0.999, 0.999], since tanh does not reach the bounds.
        seed: seed of the initial weights, of the held-out rows and of the order of rows.
        hidden: sizes of the hidden layers.
        epochs: most epochs.

    Returns:
        The policy, on the device of the data. The best epoch and its likelihood are logged.

    Raises:
        InputError: an argument is out of range, or the data are too few or not finite.
    """
    if not isinstance(data, Transitions):
        raise InputError(
            f"data must be Transitions, got {type(data).__name__}; load it with mopo_fast.load_dataset(...)"
        )
    if len(data) < _FEWEST_ROWS:
        raise InputError(f"clone_policy needs {_FEWEST_ROWS} transitions or more, got {len(data)}")
    check_range("epochs", epochs, 1, 2**31)
    check_range("seed", seed, 0, 2**64)
    observations, actions = data.observations.float(), data.actions.float()
    for name, array in ("observations", observations), ("actions", actions):
        if not bool(torch.isfinite(array).all()):
            raise InputError(f"the data's {name} must be finite")
    if bool((outside := (actions.abs() > _MOST).any(-1)).any()):
        row = int(outside.int().argmax())
        raise InputError(
            f"the data's actions must be in [-1, 1], got {actions[row].tolist()} at row {row};"
            " scale them first"
        )
    device = data.device
    generator = torch.Generator().manual_seed(derive_seed(seed, CLONE) % 2**63)
    actor = Actor(
        *(data.obs_dim, data.act_dim), hidden=hidden, log_std_min=_LOG_STD_MIN, generator=generator
    ).to(device)
    std, mean = torch.std_mean(observations.double(), 0, correction=0)
    std = torch.where(std < 1e-6, 1.0, std)
    inputs = ((observations - mean) / std).float()
    targets = torch.atanh(actions.clamp(-_LARGEST_ACTION, _LARGEST_ACTION))
    order = torch.randperm(len(data), generator=generator).to(device)
    held_out, training = order.tensor_split([min(math.ceil(_HOLDOUT * len(data)), _MOST_HELD_OUT)])
    batch = min(max(int(_BATCH_SHARE * len(data)), _LEAST_BATCH), _MOST_BATCH)
    parameters = [*actor.weights, *actor.biases]
    optimizer = Adam(parameters, _LEARNING_RATE)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihood before the tanh, a mean over rows."""
        mean, log_std = actor(inputs[rows])
        distance = (targets[rows] - mean) * (-log_std).exp()
        losses: torch.Tensor = 0.5 * distance.square() + log_std
        return losses.sum(-1).mean()

    best, kept, waited, best_epoch = math.inf, [each.detach().clone() for each in parameters], 0, 0
    for epoch in range(epochs):
        shuffled = training[torch.randperm(len(training), generator=generator).to(device)]
        for rows in shuffled.split(batch):
            optimizer.step(torch.autograd.grad(loss(rows), parameters))
        with torch.no_grad():
            held = loss(held_out).item()
        if not math.isfinite(held):
            raise InputError("the clone of the data's policy diverged; look for outliers in the observations")
        if held < best:
            best, kept, waited = held, [each.detach().clone() for each in parameters], 0
            best_epoch = epoch
        else:
            waited += 1
            if waited == _PATIENCE:
                break
    logger.info(
        "cloned the policy of %d transitions; the best epoch was number %d, with a mean log-likelihood of"
        " %.4g of the held-out actions before the tanh, but for a constant",
        *(len(data), best_epoch + 1, -best),
    )
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
        # The standardisation becomes a part of the first layer.
        weight, bias = actor.weights[0].double(), actor.biases[0].double()
        actor.weights[0].copy_(weight / std[:, None])
        actor.biases[0].copy_(bias - mean / std @ weight)
    return actor
