"""Every default, once, with its source.

"authors" is the TF1 code of Yu et al. (NeurIPS 2020, arXiv 2005.13239), github.com/tianheyu927/mopo.
Where other code differs, the difference is an option here and the authors' value is the default.

These classes are also the command line of `mopo-fast`: names, defaults and the texts below become its flags.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional, arg

from mopo_fast.errors import InputError

Activation = Literal["silu", "relu", "tanh"]
LogScale = Literal["variance", "std"]
Penalty = Literal["max_aleatoric", "max_deviation", "max_pairwise", "ensemble_std", "mixture_std"]
PenaltyMembers = Literal["all", "elites"]
FitDtype = Literal["float32", "bfloat16"]
RolloutDtype = Literal["float32", "float64", "tfloat32", "bfloat16", "float16"]
ShardFormat = Literal["hdf5", "parquet"]
Compression = Literal["none", "lzf", "gzip", "snappy", "zstd"]
ActorSchedule = Literal["constant", "cosine"]
CriticLoss = Literal["half_mse", "mse"]
Tuned = Literal["authors", "offlinerl-kit"]
Preset = Literal["mopo-tf", "offlinerl-kit", "mbrl-lib", "unifloral", "polixir", "d3rlpy"]
CheckpointFormat = Literal["mopo-fast", Preset]
# The order is the kernels': an index here is an enumerator there.
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
LOG_SCALES: tuple[LogScale, ...] = get_args(LogScale)
PENALTIES: tuple[Penalty, ...] = get_args(Penalty)
FIT_DTYPES: tuple[FitDtype, ...] = get_args(FitDtype)
ROLLOUT_DTYPES: tuple[RolloutDtype, ...] = get_args(RolloutDtype)
ACTOR_SCHEDULES: tuple[ActorSchedule, ...] = get_args(ActorSchedule)
CRITIC_LOSSES: tuple[CriticLoss, ...] = get_args(CriticLoss)
TUNED: tuple[Tuned, ...] = get_args(Tuned)
PRESETS: tuple[Preset, ...] = get_args(Preset)
CHECKPOINT_FORMATS: tuple[CheckpointFormat, ...] = get_args(CheckpointFormat)

MAX_RUNS = 10_000
"""Runs at most that one call makes."""

# On the command line `--horizon`, not `--rollout.horizon`.
_short = arg(prefix_name=False)


@dataclass(frozen=True)
class DynamicsConfig:
    """The probabilistic ensemble and its maximum-likelihood fit (authors: models/bnn.py)."""

    members: int = 7
    elites: int = 5
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    activation: Activation = "silu"
    learning_rate: float = 1e-3
    batch_size: int = 256
    """Rows per member in one step."""
    dtype: FitDtype = "float32"
    """bfloat16: of the factors of the fit's products; all else is float32. Fast on AMX."""
    weight_decay: tuple[float, ...] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    """Per layer, the last for both heads; each times 0.5 ||W||^2, weights only, added to the loss."""
    max_logvar: float = 0.5
    min_logvar: float = -10.0
    logvar_bound_weight: float = 0.01
    """Times sum(max) - sum(min), added to the loss."""
    holdout_fraction: float = 0.2
    holdout_max: int = 1000
    improvement: float = 0.01
    """A member's weights are kept when its holdout MSE falls by more than this share."""
    patience: int = 5
    """Training stops when more than this many epochs have passed since any member improved."""
    max_epochs: int | None = None
    """The authors set no cap."""

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        layers, decay = len(self.hidden) + 1, self.weight_decay
        _require(len(decay) == layers, f"weight_decay needs one value per layer, {layers}, got {decay}")
        _require_known("dtype", self.dtype, FIT_DTYPES, " of the fit")
        _require_positive(self, "", "batch_size", "members", "max_epochs", "holdout_max")
        _require(self.patience >= 0, f"patience must be at least 0, got {self.patience}")
        _require(self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}")
        _require(min(decay) >= 0, f"weight_decay must not be negative, got {decay}")
        _require(0 <= self.improvement < 1, f"improvement must be in [0, 1), got {self.improvement}")
        fraction, low, high = self.holdout_fraction, self.min_logvar, self.max_logvar
        _require(0 < fraction < 1, f"holdout_fraction must be in (0, 1), got {fraction}")
        _check_finite(self)
        _require(low < high, f"min_logvar must be less than max_logvar, got {low} and {high}")


@dataclass(frozen=True)
class RolloutConfig:
    """Model rollouts (authors: softlearning/algorithms/mopo.py, models/fake_env.py)."""

    horizon: Annotated[int | None, _short] = None
    """None: the tuned value of the task and data tier, see `mopo_fast.tasks`."""
    penalty_coef: Annotated[float | None, _short] = None
    """lambda; None: tuned, likewise. 0 is MBPO on offline data."""
    penalty: Annotated[Penalty, _short] = "max_aleatoric"
    """u(s, a), subtracted from every reward penalty_coef times."""
    penalty_members: PenaltyMembers = "all"
    """Whose predictions make the penalty. authors: all members; Unifloral: elites."""
    tuned: Tuned = "authors"
    """Whose tuned horizon and penalty_coef fill in for None."""
    termination: str | None = None
    """What ends an episode: one of `mopo_fast.tasks.BOXES`, such as hopper-authors; authors or offlinerl-kit,
    the task's rule as that code has it; None: the task's own."""
    batch_size: int = 50_000
    """Start states per rollout."""
    interval: int = 1000
    """SAC updates between rollouts: one epoch."""
    retain_epochs: int = 5
    """The model buffer holds retain_epochs * horizon * batch_size transitions."""
    dtype: RolloutDtype = "float32"
    """tfloat32, bfloat16, float16: of the factors of the networks' products; all else is float32."""

    @property
    def buffer_rows(self) -> int:
        """Rows of the model buffer."""
        assert self.horizon is not None
        return self.retain_epochs * self.horizon * self.batch_size

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range. `RolloutEngine` knows what it can do."""
        _require_known("tuned", self.tuned, TUNED)
        _require_positive(self, "rollout ", "horizon", "batch_size", "interval", "retain_epochs")
        _check_finite(self)


@dataclass(frozen=True)
class SACConfig:
    """Soft actor-critic (authors' values; others' in the comments)."""

    hidden: tuple[int, ...] = (256, 256)
    """Unifloral: three layers."""
    critics: int = 2
    """Unifloral: 10."""
    actor_learning_rate: float = 3e-4
    """OfflineRL-Kit, Unifloral: 1e-4."""
    critic_learning_rate: float = 3e-4
    """Unifloral: 1e-4."""
    alpha_learning_rate: float = 3e-4
    """OfflineRL-Kit, Unifloral: 1e-4."""
    actor_schedule: ActorSchedule = "constant"
    """OfflineRL-Kit: cosine, one step per epoch, to zero at the end."""
    log_std_min: float = -20.0
    """OfflineRL-Kit, Unifloral: -5."""
    log_std_max: float = 2.0
    target_entropy: float | Literal["act_dim"] = -3.0
    """authors: -3 on all D4RL tasks; "act_dim" is -act_dim, as the others have it."""
    critic_loss: CriticLoss = "half_mse"
    """Summed over the critics. authors: half the MSE; OfflineRL-Kit, Unifloral: MSE."""
    alpha_max: float | None = None
    """OfflineRL-Kit clamps alpha to at most 1."""
    simultaneous: bool = True
    """authors: all three gradients are taken at the parameters before the update;
    False: the critics' step comes first and the actor's gradient sees it (OfflineRL-Kit)."""
    discount: float = 0.99
    polyak: float = 0.005
    batch_size: int = 256
    real_ratio: float = 0.05
    """Share of a batch drawn from the data set: int(real_ratio * batch_size) rows, 12 of 256."""

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        rates = (self.actor_learning_rate, self.critic_learning_rate, self.alpha_learning_rate)
        _require_positive(self, "SAC's ", "batch_size")
        _require(0.0 <= self.real_ratio <= 1.0, f"real_ratio must be in [0, 1], got {self.real_ratio}")
        positive = all(0.0 < rate < math.inf for rate in rates)
        _require(positive, f"learning rates must be positive, got {rates} for actor, critic and alpha")
        _require(
            self.critics >= 1 and min(self.hidden, default=0) >= 1,
            "SAC needs at least one critic and one hidden layer, each of positive size,"
            f" got {self.critics} critics and hidden sizes {self.hidden}",
        )
        _require(0.0 <= self.discount < 1.0, f"discount must be in [0, 1), got {self.discount}")
        _require(0.0 < self.polyak <= 1.0, f"polyak must be in (0, 1], got {self.polyak}")
        alpha_max, entropy = self.alpha_max, self.target_entropy
        _require(alpha_max is None or alpha_max > 0.0, f"alpha_max must be positive or None, got {alpha_max}")
        known = entropy == "act_dim" or isinstance(entropy, (int, float))
        _require(known, f'target_entropy must be a number or "act_dim", got {entropy!r}')
        _require_known("critic_loss", self.critic_loss, CRITIC_LOSSES)
        _require_known("actor_schedule", self.actor_schedule, ACTOR_SCHEDULES)
        _check_finite(self)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation in the real environment."""

    episodes: int = 10
    interval: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    deterministic: bool = True
    """Unifloral: stochastic."""
    workers: int | None = None
    """Processes that evaluate beside the training; None: none on the CPU, whose cores train, else up to 4."""

    def validate(self) -> None:
        """Raise `InputError` where a value is out of range."""
        _require_positive(self, "evaluation ", "episodes", "interval")


@dataclass(frozen=True)
class OnlineConfig:
    """SAC in the environment itself, whose policies and replay make the data sets of every tier but random.

    D4RL's sets were made likewise, with rlkit's SAC and one environment.
    """

    environments: int = 5
    """Stepped side by side."""
    epoch_steps: int = 1000
    """Of every environment between two evaluations and checkpoints; where an epoch ends, paths are cut, as in
    rlkit."""
    random_epochs: int = 2
    """Uniform actions and no updates at first: 10,000 steps."""
    epochs: int = 200
    """1 M steps."""
    round_steps: int = 10
    """Of every environment with one policy; then as many updates as there were steps, in one call."""
    medium_score: float = 33.0
    """The first policy that reaches a third of the expert's score is the medium one. An ant that stands still
    has 31 already."""
    medium_window: int = 3
    """Evaluations in a row whose mean counts for that, so that a lucky one does not."""
    episodes: int = 5
    """Of an evaluation, deterministic."""
    sac: SACConfig = field(
        default_factory=lambda: SACConfig(target_entropy="act_dim", critic_loss="mse", real_ratio=0.0)
    )
    """rlkit's: critic_loss, target_entropy; a batch is of the replay alone."""

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
    """One MOPO run."""

    dataset: Annotated[str, Positional, arg(metavar="DATASET")]
    """A name or a file: see `mopo_fast.load_dataset`."""
    task: str | None = None
    """None: read from the data set's name; or a Python file with a task of one's own, FILE.py."""
    seed: int = 0
    """Of every random draw: the same seed gives the same run, bit for bit."""
    steps: int = 1_000_000
    """SAC updates."""
    device: str = "cpu"
    """cpu or cuda."""
    backend: str = "auto"
    """auto, or one that `mopo-fast doctor` lists; of the fit, the rollouts and SAC."""
    threads: int | None = None
    """Of the CPU kernels; None: all cores. The result does not depend on it."""
    dynamics_from: Annotated[str | None, arg(metavar="RUN")] = None
    """A folder whose dynamics.safetensors the run takes instead of fitting an ensemble."""
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sac: SACConfig = field(default_factory=SACConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def epochs(self) -> int:
        """Epochs of `rollout.interval` updates, the last one perhaps of fewer."""
        return math.ceil(self.steps / self.rollout.interval)

    def updates_after(self, epoch: int) -> int:
        """Return how many updates have been made after so many epochs."""
        return min(epoch * self.rollout.interval, self.steps)

    def validate(self) -> None:
        """Raise `InputError` where a value of the run or of a part is out of range."""
        _check_finite(self)
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require_positive(self, "", "steps")
        for part in (self.rollout, self.evaluation, self.sac):
            part.validate()
        # An ensemble that is there already is not fitted.
        if self.dynamics_from is None:
            self.dynamics.validate()


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """A run as its config.json records it: nothing is left open."""

    task_sha256: str | None = None
    """Digest of the Python file that `task` names; None: it names none."""


@dataclass(frozen=True)
class Hints:
    """What another code's files may leave open; None: what they say, else that code's default."""

    activation: Annotated[Activation | None, _short] = None
    """With --from: of the dynamics' hidden layers."""
    elites: Annotated[tuple[int, ...] | None, _short] = None
    """With --from: the members that rollouts draw from, best first."""
    absolute: Annotated[tuple[int, ...] | None, _short] = None
    """With --from: the observation dimensions whose next value is predicted itself, not its change."""


def check_runs(*values: Sequence[Any]) -> None:
    """Raise `InputError` where all combinations of `values` are more runs than one call makes."""
    runs = math.prod(max(1, len(some)) for some in values)
    if runs > MAX_RUNS:
        raise InputError(f"{runs:,} runs were asked for at once; ask for at most {MAX_RUNS:,}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-ready nested dictionaries."""
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
    """Raise `InputError` where a number of `config`, or of a config or tuple in it, is NaN or infinite."""
    for entry in dataclasses.fields(config):
        name, value = prefix + entry.name, getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            _check_finite(value, f"{name}.")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            _require(finite, f"{name} must be finite, got {value}")
