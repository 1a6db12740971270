"""Stand-in for the authors' MOPO; see mopo_tf_parts.py."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from softlearning.parts import (
    AdamOptimizer,
    Critic,
    FeedforwardGaussianPolicy,
    RLAlgorithm,
    Session,
    SimpleReplayPool,
    Variable,
)


class MOPO(RLAlgorithm):
    """MOPO with the settings of the recorded updates, and a loop that looks at nothing.

    Args:
        pools: fields of its two pools.
        hidden: widths of the hidden layers.
        settings: lr, tau, discount, target_entropy and real_ratio.
        batch_size: rows of a batch.
    """

    def __init__(
        self,
        pools: list[dict[str, Any]],
        hidden: tuple[int, ...],
        settings: dict[str, float],
        batch_size: int,
    ) -> None:
        obs_dim, act_dim = (pools[0][name].shape[1] for name in ("observations", "actions"))
        rate = settings["lr"]
        self._policy = FeedforwardGaussianPolicy((obs_dim, *hidden, 2 * act_dim))
        self._Qs, self._Q_targets = (
            tuple(Critic((obs_dim + act_dim, *hidden, 1)) for _ in range(2)) for _ in range(2)
        )
        self._log_alpha, self.global_step = Variable(np.float32(0.0)), Variable(np.int64(0))
        self._policy_optimizer, self._alpha_optimizer, *critics = (AdamOptimizer(rate) for _ in range(4))
        self._Q_optimizers = tuple(critics)
        self._training_ops = dict.fromkeys(
            ("increment_global_step", "policy_train_op", "temperature_alpha", "Q")
        )
        self._pool, self._model_pool = map(SimpleReplayPool, pools)
        self._session = Session()
        self.sampler = SimpleNamespace(_batch_size=batch_size)
        self._training_progress = SimpleNamespace(update=self._count, set_description=lambda: None)
        self._tau, self._discount = settings["tau"], settings["discount"]
        self._target_entropy, self._real_ratio = settings["target_entropy"], settings["real_ratio"]
        self._target_update_interval, self._reward_scale, self._action_prior = 1, 1.0, "uniform"
        self._epoch_length, self._model_train_freq = 1000, 1000
        self._n_train_repeat = self._train_every_n_steps = 1
        self._num_train_steps = self.shown = self.originals = 0

    def _count(self) -> None:
        self.shown += 1

    def _do_training(self, iteration: int, batch: dict[str, Any]) -> None:
        assert len(batch["rewards"]) == self.sampler._batch_size
        self.originals += 1

    def _training_batch(self, batch_size: int | None = None) -> dict[str, Any]:
        return self._model_pool.random_batch(batch_size or self.sampler._batch_size)

    def _update_target(self, tau: float | None = None) -> None:
        raise AssertionError

    def _init_actor_update(self) -> None:
        raise AssertionError

    def _init_critic_update(self) -> None:
        raise AssertionError

    def _rollout_model(self, rollout_batch_size: int) -> list[Any]:
        return self._policy.get_weights()

    def _evaluation_paths(self) -> list[Any]:
        weights: list[Any] = self._policy.trainable_variables
        return [variable.value.copy() for variable in weights]

    def get_diagnostics(self) -> Any:
        return self.global_step.value
