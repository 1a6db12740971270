"""The settings of a run, each with its default and the source of the default.

The authors are Yu et al. (NeurIPS 2020, arXiv 2005.13239), their code is github.com/tianheyu927/mopo in TF1.
Their value is the default. Other code with another value is named beside it; `presets.py` has all its values.

These classes are also the command line of `mopo-fast`: names and defaults below become its flags, and the
text of an attribute becomes the help of its flag. tyro starts a new line of the help before a line that
begins with anything but a letter. So an item of a list begins with a dash, and all other lines with a letter.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from tyro.conf import Fixed, FlagConversionOff, Positional, SuppressFixed, arg

from mopo_fast.errors import InputError

Activation = Literal["silu", "relu", "tanh"]
LogScale = Literal["variance", "std"]
Penalty = Literal["max_aleatoric", "max_deviation", "max_pairwise", "ensemble_std", "mixture_std"]
PenaltyMembers = Literal["all", "elites"]
MemberDraw = Literal["per_step", "per_rollout"]
# The order is that of csrc/common.h.
TrainingDtype = Literal["float32", "bfloat16", "bfloat16x3"]
RolloutDtype = Literal["float32", "float64", "tfloat32", "bfloat16", "bfloat16x3", "float16"]
MatmulPrecision = Literal["highest", "high", "medium"]
ShardFormat = Literal["hdf5", "parquet"]
Compression = Literal["none", "lzf", "gzip", "snappy", "zstd"]
Checksum = Literal["xxh3_128", "sha256"]
ActorSchedule = Literal["constant", "cosine"]
CriticLoss = Literal["half_mse", "mse", "mean_mse"]
ActorQ = Literal["min", "mean"]
UpdateOrder = Literal["simultaneous", "critic_first", "actor_first"]
Tuned = Literal["authors", "offlinerl-kit"]
Compat = Literal["d4rl", "offlinerl-kit"]
ZInit = Literal["constant", "episode"]
OtherFormat = Literal["mopo-tf", "offlinerl-kit", "mbrl-lib", "unifloral", "polixir", "d3rlpy"]
Preset = Literal[OtherFormat, "neubay-markov"]
CheckpointFormat = Literal["mopo-fast", OtherFormat]
ExportFormat = Literal["onnx", "torch"]
if TYPE_CHECKING:
    # `train` also takes data in memory, which the command line cannot name.
    Dataset = Any
else:
    Dataset = str
# The order is fixed: the kernels' enumerators in csrc/ are indices into these tuples.
MAX_MEMBERS = 256
"""Most members of an ensemble."""

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
LOG_SCALES: tuple[LogScale, ...] = get_args(LogScale)
PENALTIES: tuple[Penalty, ...] = get_args(Penalty)
TRAINING_DTYPES: tuple[TrainingDtype, ...] = get_args(TrainingDtype)
ROLLOUT_DTYPES: tuple[RolloutDtype, ...] = get_args(RolloutDtype)
MATMUL_PRECISIONS: tuple[MatmulPrecision, ...] = get_args(MatmulPrecision)
ACTOR_SCHEDULES: tuple[ActorSchedule, ...] = get_args(ActorSchedule)
CRITIC_LOSSES: tuple[CriticLoss, ...] = get_args(CriticLoss)
ACTOR_QS: tuple[ActorQ, ...] = get_args(ActorQ)
UPDATE_ORDERS: tuple[UpdateOrder, ...] = get_args(UpdateOrder)
MEMBER_DRAWS: tuple[MemberDraw, ...] = get_args(MemberDraw)
CHECKSUMS: tuple[Checksum, ...] = get_args(Checksum)
TUNED: tuple[Tuned, ...] = get_args(Tuned)
COMPATS: tuple[Compat, ...] = get_args(Compat)
PRESETS: tuple[Preset, ...] = get_args(Preset)
CHECKPOINT_FORMATS: tuple[CheckpointFormat, ...] = get_args(CheckpointFormat)
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

LAYER_NORM_EPSILON = 1e-5
"""Number that a layer norm adds to the variance, PyTorch's default. csrc/common.h has it too."""

MAX_RUNS = 10_000
"""Upper limit of the runs that one call makes."""
MAX_STEPS = 10**12
"""Upper limit of the SAC updates of a run, years of work for any machine."""
MAX_WORKERS = 1000
"""Upper limit of the processes that evaluate a run."""
MAX_EPISODES = 10_000
"""Upper limit of the episodes of an evaluation, each of which has an environment in memory."""
LARGEST_FLOAT32 = 3.4028234663852886e38
"""Largest float32, the type of parameters and optimizers."""
UNTUNED = (5, 1.0)
"""The horizon and penalty_coef of data sets that nobody has published tuned values for.

They are a third party's choice, and the most frequent pair of the tuned ones.
"""


def flag(default: str | None = None, metavar: str | None = None, prefix: bool = True) -> Any:
    """Say how a field appears on the command line.

    Args:
        default: text to show as the default where the value is None or empty. A preset may set another value,
            which is shown as it is.
        metavar: text to show in place of the flag's value.
        prefix: False drops the name of the config's part from the flag, as in `--horizon`, which is
            `rollout.horizon`.
    """

    def hint(value: str) -> str:
        return f"(default: {default if value in ('None', '') else value})"

    return arg(metavar=metavar, prefix_name=prefix, help_behavior_hint=None if default is None else hint)


def one_of(names: Sequence[str]) -> str:
    """Join the values that a flag takes to its metavar, in tyro's form but without None."""
    return f"{{{','.join(names)}}}"


def of_precision(names: Sequence[str]) -> Any:
    """Say how a dtype appears on the command line that follows from the precision of the products."""
    return flag("set by --matmul-precision", one_of(names))


def switch(on: str, off: str) -> Any:
    """Name the two states of a field that is True or False, to be shown as its default."""
    return arg(help_behavior_hint=lambda value: f"(default: {on if value == 'True' else off})")


@dataclass(frozen=True)
class DataConfig:
    """Transitions that are taken from the data set.

    The defaults are not the authors': every transition with its true successor is taken. The authors' and
    Unifloral's values are the presets `mopo-tf` and `unifloral`.

    Attributes:
        compat: Loader of other code whose rows are taken. Without it every row has its true successor.
            - None: true successors, where a preset has another value.
            - d4rl: d4rl.qlearning_dataset, which the authors and Unifloral use. The successor is the next
            row's observation, after a terminal the first one of the next episode. Rows with a time-out and
            the last row are left out.
            - offlinerl-kit: true successors, without the rows with a time-out and the last row.
        max_transitions: Number of transitions to keep, the last ones of the data set. The authors' pool
            keeps 1000000.
    """

    compat: Annotated[Compat | None, flag("true successors", f"{{None,{','.join(COMPATS)}}}")] = None
    max_transitions: Annotated[int | None, flag("all", "INT")] = None

    def validate(self) -> None:
        """Raise `InputError` where a value is unknown or out of range."""
        _require_known("data.compat", self.compat or COMPATS[0], COMPATS)
        _require_positive(self, "data.", "max_transitions")


@dataclass(frozen=True)
class DynamicsConfig:
    """Probabilistic ensemble and its maximum-likelihood fit. Defaults are from the authors' models/bnn.py.

    Attributes:
        members: Number of networks in the ensemble.
        elites: Number of members that rollouts draw from. They are the ones with the lowest holdout error.
        hidden: Widths of the hidden layers. For another number of layers give weight_decay too, which has
            one value more.
        activation: Activation function of the hidden layers.
        layer_norm: Normalise the outputs of each hidden layer before its activation. The authors do not.
            Long rollouts are more accurate with it (Ni et al. 2025).
        learning_rate: Learning rate of Adam.
        batch_size: Transitions of each member in one gradient step.
        dtype: Precision of the factors in the matrix products of the fit. Sums and parameters are always
            float32.
        weight_decay: Weight decay of each layer; the last value is that of both output heads. The loss gains
            half of it times the sum of the squared weights of the layer. Biases have no decay.
        max_logvar: Upper bound of the predicted log-variances before training. The bound itself is learned.
        min_logvar: Lower bound of the predicted log-variances before training. The bound itself is learned.
        logvar_bound_weight: Weight of sum(max_logvar) - sum(min_logvar) in the loss, which keeps the bounds
            close to each other.
        holdout_fraction: Share of the transitions that is held out to measure the error after each epoch.
        holdout_max: Upper limit of the number of transitions held out.
        improvement: Relative fall of a member's holdout error that counts as an improvement.
            The member's weights are kept whenever it improves.
        patience: Number of epochs in a row that may pass without an improvement of any member. The fit stops
            at epoch patience + 1 in a row without one: after six with patience 5, as in the authors' code.
            OfflineRL-Kit stops after five: give 4.
        max_epochs: Upper limit of the number of epochs. The authors set none.
    """

    members: int = 7
    elites: int = 5
    hidden: Annotated[tuple[int, ...], flag(metavar="INT ...")] = (200, 200, 200, 200)
    activation: Activation = "silu"
    layer_norm: Annotated[bool, switch("on", "off")] = False
    learning_rate: float = 1e-3
    batch_size: int = 256
    dtype: Annotated[TrainingDtype | None, of_precision(TRAINING_DTYPES)] = None
    weight_decay: Annotated[tuple[float, ...], flag(metavar="FLOAT ...")] = (
        2.5e-5,
        5e-5,
        7.5e-5,
        7.5e-5,
        1e-4,
    )
    max_logvar: float = 0.5
    min_logvar: float = -10.0
    logvar_bound_weight: float = 0.01
    holdout_fraction: float = 0.2
    holdout_max: int = 1000
    improvement: float = 0.01
    patience: int = 5
    max_epochs: Annotated[int | None, flag("no limit", "INT")] = None

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        layers, decay = len(self.hidden) + 1, self.weight_decay
        _require(
            len(decay) == layers,
            f"hidden has {layers - 1} layers, so weight_decay needs {layers} values, one more; got {decay}",
        )
        _require_known("dtype", self.dtype or "float32", TRAINING_DTYPES, " of the fit")
        _require_positive(self, "", "batch_size", "members", "max_epochs", "holdout_max")
        _require(self.patience >= 0, f"patience must be at least 0, got {self.patience}")
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        _require(min(decay) >= 0, f"weight_decay must not be negative, got {decay}")
        weight = self.logvar_bound_weight
        _require(not weight < 0, f"logvar_bound_weight must not be negative, got {weight}")
        _require(0 <= self.improvement < 1, f"improvement must be in [0, 1), got {self.improvement}")
        fraction, low, high = self.holdout_fraction, self.min_logvar, self.max_logvar
        _require(0 < fraction < 1, f"holdout_fraction must be in (0, 1), got {fraction}")
        _check_finite(self)
        _require(low < high, f"min_logvar must be less than max_logvar, got {low} and {high}")


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts of the policy in the ensemble.

    Defaults are from the authors' softlearning/algorithms/mopo.py and models/fake_env.py.

    Attributes:
        horizon: Steps of a rollout, the h of the paper.
        penalty_coef: Weight of the penalty in the reward, the lambda of the paper. At 0 there is no penalty,
            and the algorithm is MBPO on offline data.
        penalty: Measure u(s, a) of the ensemble's uncertainty. Each reward loses penalty_coef times u.
            - max_aleatoric (the authors'): largest, over members, of the norm of the predicted standard
            deviations.
            - max_deviation: largest, over members, of the distance of the mean from the average of all means.
            - max_pairwise (MOReL): largest, over pairs of members, of the distance between their means.
            - ensemble_std (OfflineRL-Kit): standard deviation of the members' means, as the root mean square
            over dimensions.
            - mixture_std (Lu et al. 2022): norm of the standard deviations of the members' mixture.
        penalty_members: Members whose predictions make the penalty. The authors' code uses all members,
            Unifloral the elites.
        member: Steps that a drawn elite makes. The authors draw one for each step; with per_rollout one
            makes all steps of a rollout.
        truncate_at: Penalty that ends a rollout. The step with a higher one is the rollout's last. It is no
            terminal: its next state has a value.
        truncate_quantile: Quantile, 0 to 1, of the penalties of the data set's transitions, which sets
            truncate_at. NEUBAY (Ni et al. 2025) has 1, the highest penalty in the data.
        halt_reward: Reward of the last step of a rollout that its penalty ends. The step is then terminal,
            as in MOReL.
        tuned: Code whose tuned horizon and penalty_coef are used where these two are not given.
        termination: Rule by which a rollout ends early. The task's own rule is the authors', with a mistake
            in hopper's corrected. Give authors or offlinerl-kit for the task's rule as that code has it. Or
            name a rule: halfcheetah, hopper, walker2d, ant, halfcheetah-jump, ant-angle, humanoid, pendulum,
            hopper-authors, hopper-offlinerl-kit, halfcheetah-offlinerl-kit or walker2d-offlinerl-kit.
        batch_size: Number of rollouts made at once, each from a state drawn from the data set.
        interval: Number of SAC updates between two such batches of rollouts. These updates are one epoch.
        retain_epochs: Number of epochs whose rollouts stay in the model buffer, which has room for
            retain_epochs * horizon * batch_size transitions.
        dtype: Precision of the networks. With tfloat32, bfloat16, bfloat16x3 or float16 only the factors of
            matrix products are rounded; everything else is float32. In bfloat16x3 a factor is the sum of two
            numbers in bfloat16.
    """

    horizon: Annotated[int | None, flag(f"tuned for the data set, or {UNTUNED[0]}", "INT", prefix=False)] = (
        None
    )
    penalty_coef: Annotated[
        float | None, flag(f"tuned for the data set, or {UNTUNED[1]:g}", "FLOAT", prefix=False)
    ] = None
    penalty: Annotated[Penalty, flag(prefix=False)] = "max_aleatoric"
    penalty_members: PenaltyMembers = "all"
    member: MemberDraw = "per_step"
    truncate_at: Annotated[float | None, flag("no limit", "FLOAT")] = None
    truncate_quantile: Annotated[float | None, flag("no limit", "FLOAT")] = None
    halt_reward: Annotated[float | None, flag("no halt", "FLOAT")] = None
    tuned: Tuned = "authors"
    termination: Annotated[str | None, flag("the task's own rule", "RULE")] = None
    batch_size: int = 50_000
    interval: int = 1000
    retain_epochs: int = 5
    dtype: Annotated[RolloutDtype | None, of_precision(ROLLOUT_DTYPES)] = None

    @property
    def truncates(self) -> bool:
        """True where a penalty can end a rollout."""
        return self.truncate_at is not None or self.truncate_quantile is not None

    @property
    def buffer_rows(self) -> int:
        """Rows of the model buffer."""
        assert self.horizon is not None
        return self.retain_epochs * self.horizon * self.batch_size

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range. `RolloutEngine` checks the penalty and dtype."""
        _require_known("tuned", self.tuned, TUNED)
        _require_positive(self, "rollout ", "horizon", "batch_size", "interval", "retain_epochs")
        _require_known("rollout.member", self.member, MEMBER_DRAWS)
        at, quantile = self.truncate_at, self.truncate_quantile
        _require(at is None or quantile is None, "give truncate_at or truncate_quantile, not both")
        _require(at is None or at >= 0, f"truncate_at must not be negative, got {at}")
        _require(
            quantile is None or 0 <= quantile <= 1, f"truncate_quantile must be in [0, 1], got {quantile}"
        )
        _require(
            self.halt_reward is None or self.truncates,
            "halt_reward needs truncate_at or truncate_quantile, which end a rollout",
        )
        _check_finite(self)


@dataclass(frozen=True)
class SACConfig:
    """Soft actor-critic. Defaults are the authors'.

    Attributes:
        hidden: Widths of the hidden layers of the actor and of each critic. Unifloral has three layers.
        critics: Number of critics, whose lowest Q value counts unless one of the next two settings is given.
            Unifloral and REDQ have 10.
        target_critics: Number of critics that the lowest Q value of the critics' targets is taken from. They
            are drawn anew for each update. REDQ (Chen et al., 2021) has 2.
        actor_q: Q value that the actor's step raises: the lowest of the critics' (min) or their mean (mean).
            REDQ has the mean.
        actor_learning_rate: Learning rate of the actor. OfflineRL-Kit and Unifloral have 1e-4.
        critic_learning_rate: Learning rate of the critics. Unifloral has 1e-4.
        alpha_learning_rate: Learning rate of alpha, the weight of the entropy. OfflineRL-Kit and Unifloral
            have 1e-4. With 0, alpha stays 1.
        actor_schedule: Course of the actor's learning rate. OfflineRL-Kit has cosine, which lowers the rate
            once per epoch, to zero at the end.
        log_std_min: Lower bound of the policy's log standard deviations. The bound is -5
            in OfflineRL-Kit and Unifloral.
        log_std_max: Upper bound of the policy's log standard deviations.
        log_prob_epsilon: Number that is added to 1 - tanh^2 in the log-probability of an action, before its
            logarithm is taken. It limits the pull of the entropy on actions near -1 and 1. The number is 1e-6
            in OfflineRL-Kit.
        target_entropy: Entropy of the policy that alpha is adjusted to. The authors have -3 on all D4RL
            tasks. Other code has act_dim, which stands for minus the number of action dimensions.
        critic_loss: Loss of each critic. The losses of all critics are summed. The authors have half the mean
            squared error, OfflineRL-Kit and Unifloral the mean squared error. MOBILE divides the latter by
            the number of critics (mean_mse).
        alpha_max: Upper limit of alpha. OfflineRL-Kit has 1.
        entropy_backup: True adds the entropy of the next action, times alpha, to the critics' targets. MOBILE
            leaves it out.
        target_min: Lower limit of the critics' targets. MOBILE has 0.
        order: Order of the steps of an update.
            - simultaneous (the authors'): all gradients are taken before any step.
            - critic_first (OfflineRL-Kit): the critics' step, then the actor's through the new critics.
            - actor_first (Unifloral): alpha's step; the actor's, with the new alpha and the old critics; the
            target critics move towards the old critics; the critics' step, by the new actor, alpha and
            target.
        discount: Discount factor of the returns.
        polyak: Share of the distance to the critics that the target critics move in each update.
        adam_epsilon: Number that is added to Adam's divisor. It is 1e-5 in Unifloral.
        batch_size: Transitions of one update, from the data set and the model buffer together.
        real_ratio: Share of each batch that is drawn from the data set, rounded down to whole transitions.
            The rest is drawn from the model buffer.
        dtype: Precision of the factors in the matrix products of SAC, except in the last layer of each
            network and in the first, which is bfloat16x3 on AMX. Everything else is always float32.
    """

    hidden: Annotated[tuple[int, ...], flag(metavar="INT ...")] = (256, 256)
    critics: int = 2
    target_critics: Annotated[int | None, flag("all", "INT")] = None
    actor_q: ActorQ = "min"
    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    alpha_learning_rate: float = 3e-4
    actor_schedule: ActorSchedule = "constant"
    log_std_min: float = -20.0
    log_std_max: float = 2.0
    log_prob_epsilon: float = 0.0
    target_entropy: float | Literal["act_dim"] = -3.0
    critic_loss: CriticLoss = "half_mse"
    alpha_max: Annotated[float | None, flag("no limit", "FLOAT")] = None
    entropy_backup: Annotated[bool, FlagConversionOff] = True
    target_min: Annotated[float | None, flag("no limit", "FLOAT")] = None
    order: UpdateOrder = "simultaneous"
    discount: float = 0.99
    polyak: float = 0.005
    adam_epsilon: float = 1e-8
    batch_size: int = 256
    real_ratio: float = 0.05
    dtype: Annotated[TrainingDtype | None, of_precision(TRAINING_DTYPES)] = None

    @property
    def critic_loss_scale(self) -> float:
        """Factor of a critic's mean squared error in its loss."""
        return {"half_mse": 0.5, "mse": 1.0, "mean_mse": 1.0 / self.critics}[self.critic_loss]

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        rates, alpha_rate = (self.actor_learning_rate, self.critic_learning_rate), self.alpha_learning_rate
        _require_positive(self, "SAC's ", "batch_size")
        _require(0.0 <= self.real_ratio <= 1.0, f"real_ratio must be in [0, 1], got {self.real_ratio}")
        positive = all(0.0 < rate < math.inf for rate in rates)
        _require(positive, f"learning rates must be positive, got {rates} for actor and critic")
        in_range = 0.0 <= alpha_rate < math.inf
        _require(in_range, f"alpha's learning rate must be 0 or more, got {alpha_rate}")
        _require(
            self.critics >= 1 and min(self.hidden, default=0) >= 1,
            "SAC needs at least one critic and one hidden layer, each of positive size,"
            f" got {self.critics} critics and hidden sizes {self.hidden}",
        )
        _require(
            self.target_critics is None or 1 <= self.target_critics <= self.critics,
            f"target_critics must be 1 to the number of critics, {self.critics}, or None for all, got"
            f" {self.target_critics}",
        )
        _require(0.0 <= self.discount < 1.0, f"discount must be in [0, 1), got {self.discount}")
        _require(0.0 < self.polyak <= 1.0, f"polyak must be in (0, 1], got {self.polyak}")
        alpha_max, entropy = self.alpha_max, self.target_entropy
        _require(alpha_max is None or alpha_max > 0.0, f"alpha_max must be positive or None, got {alpha_max}")
        epsilon = self.log_prob_epsilon
        _require(0.0 <= epsilon < 1.0, f"log_prob_epsilon must be in [0, 1), got {epsilon}")
        known = entropy == "act_dim" or isinstance(entropy, (int, float))
        _require(known, f'target_entropy must be a number or "act_dim", got {entropy!r}')
        adam = self.adam_epsilon
        _require(0.0 < adam < 1.0, f"adam_epsilon must be in (0, 1), got {adam}")
        _require_known("critic_loss", self.critic_loss, CRITIC_LOSSES)
        _require_known("actor_q", self.actor_q, ACTOR_QS)
        _require_known("order", self.order, UPDATE_ORDERS)
        _require_known("actor_schedule", self.actor_schedule, ACTOR_SCHEDULES)
        _require_known("dtype", self.dtype or "float32", TRAINING_DTYPES, " of SAC")
        _check_finite(self)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluations of the policy in the real environment during the training.

    Attributes:
        episodes: Number of episodes of one evaluation.
        interval: Epochs between two evaluations. The last epoch is always evaluated.
        deterministic: True takes the mean action of the policy. False samples actions, as Unifloral does.
        workers: Number of processes that evaluate while the training goes on. With 0 the training waits for
            each evaluation, which is best on the CPU, where the training itself uses all cores.
    """

    episodes: int = 10
    interval: int = 1
    deterministic: Annotated[bool, FlagConversionOff] = True
    workers: Annotated[int | None, flag("0 on the CPU, else up to 4", "INT")] = None

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        _require_positive(self, "evaluation ", "episodes", "interval")
        workers, episodes = self.workers, self.episodes
        _require(
            workers is None or 0 <= workers <= MAX_WORKERS,
            f"evaluation workers must be 0 to {MAX_WORKERS:,}, got {workers}",
        )
        _require(
            episodes <= MAX_EPISODES, f"evaluation episodes must be at most {MAX_EPISODES:,}, got {episodes}"
        )


@dataclass(frozen=True)
class OnlineConfig:
    """SAC trained online, whose policies and replay buffer make the data sets of every tier but random.

    D4RL's sets were made in the same way, with rlkit's SAC and one environment.

    Attributes:
        environments: Number of environments that are stepped side by side.
        epoch_steps: Steps of each environment between two evaluations and checkpoints. Paths are cut where an
            epoch ends, as in rlkit.
        random_epochs: Number of epochs at the beginning with uniform actions and no updates. The default is
            10,000 steps.
        epochs: Number of epochs. The default is 1 M steps.
        round_steps: Steps that each environment takes before the policy is updated. One update follows for
            each step of each environment, all in one call.
        medium_score: Score at which a policy is the medium one, a third of the expert's. An ant that stands
            still has 31 already.
        medium_window: Number of consecutive evaluations whose mean must reach that score, so that a lucky one
            does not.
        episodes: Episodes of an evaluation, in which the policy is deterministic.
        sac: Settings of SAC. critic_loss and target_entropy are rlkit's. Batches are drawn from the replay
            buffer alone.
    """

    environments: int = 5
    epoch_steps: int = 1000
    random_epochs: int = 2
    epochs: int = 200
    round_steps: int = 10
    medium_score: float = 33.0
    medium_window: int = 3
    episodes: int = 5
    sac: SACConfig = field(
        default_factory=lambda: SACConfig(
            target_entropy="act_dim", critic_loss="mse", real_ratio=0.0, dtype="float32"
        )
    )

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        sizes = ("environments", "round_steps", "epoch_steps", "random_epochs", "medium_window", "episodes")
        _require_positive(self, "", *sizes)
        steps, of_round = self.epoch_steps, self.round_steps
        whole = f"epoch_steps must be a multiple of round_steps, got {steps} and {of_round}"
        _require(steps % of_round == 0, whole)
        few, many = self.random_epochs, self.epochs
        _require(many > few, f"epochs must be more than random_epochs, got {many} and {few}")
        self.sac.validate()


@dataclass(frozen=True)
class TrainConfig:
    """One MOPO run.

    Attributes:
        dataset: Name or file of the data set. A name is one of D4RL's (hopper-medium-v2, downloaded if need
            be), of `mopo-fast collect` (hopper-medium-local) or of Minari (minari:ID). A file is one
            in D4RL's layout (.hdf5, .npz, .parquet), a NeoRL .npz, or a .pkl of trajectories. A folder of
            shards that `mopo-fast rollout` has written is a data set too.
        task: Task, which defines the environment, the termination rule and the reference scores. Give a name,
            or a Python file, FILE.py, with a task of your own.
        seed: Seed of all random numbers. The same seed reproduces the run bit for bit on one instruction set,
            backend and dtype.
        steps: Number of SAC updates, such as 1000000 or 1e6.
        device: Device that fits, makes rollouts and trains: cpu or cuda.
        backend: Implementation of the fit, the rollouts and SAC: auto to choose one, or a
            name that `mopo-fast doctor` lists.
        threads: Number of threads of the CPU kernels. The result does not depend on it.
        matmul_precision: Precision of the matrix products of the fit, the rollouts and SAC, by the names of
            torch.set_float32_matmul_precision: highest for float32, high for bfloat16x3 on a CPU and TF32 on
            a GPU, medium for bfloat16. A part takes float32 if it is no faster in the lower precision. The
            settings dynamics.dtype, rollout.dtype and sac.dtype override it for one part.
        preset: Code base whose hyperparameters are the defaults of this run.
        dynamics_from: Folder of another run or of `mopo-fast fit`, whose ensemble is used instead of fitting
            a new one.
        data: Transitions that are taken from the data set.
        dynamics: Probabilistic ensemble and its maximum-likelihood fit.
        rollout: Rollouts of the policy in the ensemble. Their rewards are penalised for its uncertainty.
        sac: Soft actor-critic, which trains the policy on these rollouts and on the data set.
        keep_policies: Epochs between two policies that are kept in the folder's policies/, for `mopo-fast
            select`. A policy takes about 0.3 MB. The last one is always kept.
        evaluation: Evaluations of the policy in the real environment during the training.
    """

    dataset: Annotated[Dataset, Positional, arg(metavar="DATASET")]
    task: Annotated[str | None, flag("read from the data set's name", "TASK")] = None
    seed: int = 0
    steps: int = 1_000_000
    device: str = "cpu"
    backend: str = "auto"
    threads: Annotated[int | None, flag("all cores; in a sweep, 1 for each run", "INT")] = None
    matmul_precision: MatmulPrecision = "highest"
    # `mopo-fast --preset` sets it, together with all other defaults.
    preset: Annotated[Preset | None, Fixed, SuppressFixed] = None
    dynamics_from: Annotated[str | None, flag("fit a new ensemble", "RUN")] = None
    data: DataConfig = field(default_factory=DataConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sac: SACConfig = field(default_factory=SACConfig)
    keep_policies: Annotated[int | None, flag("keep the last policy alone", "INT")] = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def epochs(self) -> int:
        """Number of epochs of `rollout.interval` updates; the last one may have fewer."""
        return -(-self.steps // self.rollout.interval)

    def updates_after(self, epoch: int) -> int:
        """Return the number of updates made by the end of `epoch` epochs."""
        return min(epoch * self.rollout.interval, self.steps)

    def validate(self) -> None:
        """Raise `InputError` where a value of the run or of one of its parts is out of range."""
        _check_finite(self)
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require_positive(self, "", "steps", "keep_policies")
        _require_known("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
        _require(self.steps <= MAX_STEPS, f"steps must be at most {MAX_STEPS:,}, got {self.steps:.3g}")
        for part in (self.data, self.rollout, self.evaluation, self.sac):
            part.validate()
        # The settings of a fit are not used where the ensemble is given.
        if self.dynamics_from is None:
            self.dynamics.validate()


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """A run as its config.json records it, with task, horizon, penalty_coef and dtypes filled in.

    Attributes:
        horizon_from: origin of the horizon: "given", "preset NAME", "tuned by CODE for TASK TIER", or
            "fallback, none is tuned for TASK TIER". It is empty where it is not recorded.
        penalty_coef_from: origin of penalty_coef, likewise.
        task_sha256: SHA-256 digest of the Python file that `task` names, or None where it names no file.
        data_sha256: SHA-256 digest of all arrays of data that were given in memory, or None where `dataset`
            is a name or a path.
        env_id: id of the environment of the evaluations, or None for the task's own. It is the version that
            the data set's metadata name.
        reference_returns: returns that score 0 and 100 in the data set's metadata, or None for the task's.
    """

    task_sha256: str | None = None
    data_sha256: str | None = None
    env_id: str | None = None
    reference_returns: tuple[float, float] | None = None
    horizon_from: str = ""
    penalty_coef_from: str = ""


@dataclass(frozen=True)
class SweepConfig(TrainConfig):
    """Settings that all runs of a sweep share. Their seeds are given apart, so there is no --seed."""

    seed: Annotated[int, SuppressFixed, Fixed] = 0


@dataclass(frozen=True)
class FitConfig:
    """Settings of `mopo-fast fit`, as its config.json records them.

    Attributes:
        dataset: name or file of the data set.
        task: task that the data were compared with, or None.
        seed: seed of all random numbers.
        device: device that fits.
        backend: implementation of the fit.
        threads: number of threads of the CPU kernels, or None for all cores.
        dynamics: settings of the ensemble and its fit.
        matmul_precision: precision that the dtype in `dynamics` follows from, if none was given.
        data: transitions that are taken from the data set.
    """

    dataset: str
    task: str | None
    seed: int
    device: str
    backend: str
    threads: int | None
    dynamics: DynamicsConfig
    matmul_precision: MatmulPrecision = "highest"
    data: DataConfig = field(default_factory=DataConfig)

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require_known("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
        self.data.validate()
        self.dynamics.validate()


@dataclass(frozen=True)
class Hints:
    """Properties of models that another code's files may lack. They are used with --from alone.

    Attributes:
        activation: Activation function of the ensemble's hidden layers.
        elites: Indices of the members that rollouts draw from, best first.
        absolute: Observation dimensions whose next value the ensemble predicts itself, not its change.
    """

    activation: Annotated[
        Activation | None,
        flag("read from the files", one_of(ACTIVATIONS), prefix=False),
    ] = None
    elites: Annotated[
        tuple[int, ...] | None,
        flag("read from the files", "INT ...", prefix=False),
    ] = None
    absolute: Annotated[
        tuple[int, ...] | None,
        flag("read from the files", "INT ...", prefix=False),
    ] = None


def check_runs(*values: Sequence[Any]) -> None:
    """Raise `InputError` where the combinations of `values` are more than `MAX_RUNS`."""
    runs = math.prod(max(1, len(some)) for some in values)
    if runs > MAX_RUNS:
        raise InputError(f"{runs:,} runs were asked for at once; ask for at most {MAX_RUNS:,}")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested dictionaries that JSON can hold."""
    return dataclasses.asdict(config)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InputError(otherwise)


def _require_known(what: str, value: str, known: Sequence[str], of: str = "") -> None:
    _require(value in known, f"unknown {what} {value!r}{of}; there are: {', '.join(known)}")


def _require_positive(config: Any, what: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value >= 1, f"{what}{name} must be at least 1, got {value}")


def _check_finite(config: Any, prefix: str = "") -> None:
    """Raise `InputError` where a number in `config` or its parts is not finite in float32."""
    for entry in dataclasses.fields(config):
        name, value = prefix + entry.name, getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{name}.")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            _require(finite, f"{name} must be finite, got {value}")
            fits = not isinstance(number, float) or abs(number) <= LARGEST_FLOAT32
            bound = f"at most {LARGEST_FLOAT32:.1e} in size, as float32 is"
            _require(fits, f"{name} must be {bound}, got {value}")
