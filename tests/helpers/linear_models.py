"""Policies and ensembles of one dimension, whose returns can be computed by hand."""

import torch

from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.policy import Actor


def constant_actor(raw: float, obs_dim: int = 1) -> Actor:
    """Return an actor whose mean action is tanh(raw) everywhere."""
    actor = Actor(obs_dim, 1, hidden=(4,))
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        actor.biases[-1][0] = raw
    return actor


def linear_ensemble(of_state: float, of_action: float, deviation: float = 0.0) -> EnsembleDynamics:
    """Return an ensemble without noise: s' = (1 + of_state) s + of_action a, with the reward s + 1.

    The second of its two members is no elite. Both means lie at `deviation` from their average.
    """
    ensemble = EnsembleDynamics(1, 1, members=2, elites=1, hidden=(), max_logvar=-400.0, min_logvar=-400.0)
    with torch.no_grad():
        ensemble.weights[0].zero_()
        ensemble.biases[0].zero_()
        ensemble.weights[0][:, 0, 0] = of_state
        ensemble.weights[0][:, 1, 0] = of_action
        ensemble.weights[0][:, 0, 1] = 1.0
        ensemble.biases[0][:, 1] = 1.0
        ensemble.biases[0][1, 0] = 2.0 * deviation
    return ensemble
