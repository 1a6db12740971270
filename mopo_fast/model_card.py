"""The model card of a run: README.md of its repository on the Hugging Face Hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopo_fast._version import __version__
from mopo_fast.config import RunConfig
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.policy import Actor
from mopo_fast.run.command import train_command
from mopo_fast.run.folder import read_config, read_recorded, read_summary
from mopo_fast.tasks import TASKS

_PAPER = "[Yu et al. 2020](https://arxiv.org/abs/2005.13239)"
# Most characters of a value. A file from elsewhere may hold values of any length.
_LONGEST = 200


def model_card(run: Path, repo: str) -> str:
    """Return the model card of a run: its data set, score, settings and versions, and code that loads it.

    Args:
        run: folder of the run, whose files have been checked.
        repo: name of its repository, USER/NAME.

    Raises:
        InputError: a file of the run is damaged.
    """
    config = read_config(run)
    summary = read_summary(run) if (run / "summary.json").is_file() else None
    actor, ensemble = Actor.load(run), EnsembleDynamics.load(run)
    dataset, task = _code(config.dataset), _code(config.task or "unknown")
    parts = [
        _front_matter(config, summary, repo),
        f"# MOPO on {dataset}",
        f"A policy for the task {task}, trained by MOPO ({_PAPER}) on the data set {dataset}, and the"
        " dynamics ensemble that it was trained in. Both were made by mopo_fast, model-based offline policy"
        " optimization with compiled kernels.",
        "## Score",
        *_score(config, summary),
        "## Load",
        *_loading(config, repo, actor),
        "## Networks and settings",
        _table(_networks(config, actor, ensemble)),
        "This command trains with the same settings:",
        _fenced("sh", train_command(read_recorded(run / "config.json"))),
    ]
    if summary is not None:
        versions = summary.get("versions", {})
        made = {name: _code(str(version)) for name, version in versions.items()}
        parts += ["## Versions", "The run was made with:", _table(made)] if made else []
    return "\n\n".join(parts) + f"\n\nmopo_fast {__version__} wrote this card.\n"


def _front_matter(config: RunConfig, summary: Mapping[str, Any] | None, repo: str) -> str:
    """Return the metadata that the Hub reads, in YAML between lines of dashes."""
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if summary is not None and summary.get("scored_by") != "model":
        values = {"mean_reward": _plus_minus(summary, "return", "+/-")}
        if summary["score_mean"] is not None:
            values["normalized_score"] = _plus_minus(summary, "score", "+/-")
        results = [
            EvalResult(
                task_type="reinforcement-learning",
                dataset_type=_plain(config.dataset),
                dataset_name=_plain(config.dataset),
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in values.items()
        ]
    tags = ["reinforcement-learning", "offline-reinforcement-learning", "model-based-rl", "mopo"]
    data = ModelCardData(
        library_name="mopo_fast", tags=tags, model_name=repo.rpartition("/")[2], eval_results=results
    )
    return f"---\n{data.to_yaml()}\n---"


def _score(config: RunConfig, summary: Mapping[str, Any] | None) -> list[str]:
    if summary is None:
        return ["The training is not finished, so there is no score yet."]
    rows = {"return": _plus_minus(summary, "return", "±")}
    if summary["score_mean"] is not None:
        rows["normalised score"] = _plus_minus(summary, "score", "±")
    episodes = config.evaluation.episodes
    acts = "its mean acting" if config.evaluation.deterministic else "with sampled actions"
    task = config.task or "unknown"
    env_id = config.env_id or (TASKS[task].env_id if task in TASKS else task)
    where = f"in MuJoCo ({_code(env_id)})"
    if summary.get("scored_by") == "model":
        where = "in rollouts of the ensemble itself, **not in an environment**"
    return [
        _table(rows),
        f"Mean ± standard deviation over {episodes} episode{'s' * (episodes != 1)} {where}, of the last"
        f" policy, after {summary['updates']:,} updates, {acts}. This is one training, with seed"
        f" {config.seed}. The deviation is that of episodes; it says nothing about other seeds.",
    ]


def _loading(config: RunConfig, repo: str, actor: Actor) -> list[str]:
    name = repo.rpartition("/")[2]
    evaluate = f"mopo-fast evaluate runs/{name}"
    if (config.task or "").endswith(".py"):
        evaluate += f" --task {_plain(config.task or '')}"
    python = f"""\
from mopo_fast import Actor, EnsembleDynamics
from mopo_fast.hub import pull

run = pull("{repo}")  # downloads to runs/{name}
actor = Actor.load(run)
dynamics = EnsembleDynamics.load(run)
actions = actor.predict([[0.0] * {actor.obs_dim}])  # observations [n, {actor.obs_dim}]"""
    texts = [
        "Install mopo_fast with its extra `hub`: `pip install '.[hub]'` in the checkout.",
        _fenced("python", python),
        "Actions are in [-1, 1], which stands for the range of the environment. On the command line:",
        _fenced("sh", f"mopo-fast pull {repo}\n{evaluate}"),
    ]
    if (config.task or "").endswith(".py"):
        texts.append(
            f"The task is a Python file, {_code(config.task or '')}, which is not in this repository."
        )
    return texts


def _networks(config: RunConfig, actor: Actor, ensemble: EnsembleDynamics) -> dict[str, str]:
    members = f"{ensemble.members} members, elites {ensemble.elites.tolist()}"
    return {
        "observations, actions": f"{actor.obs_dim}, {actor.act_dim}",
        "policy": f"{_layers(actor.hidden)}, {actor.activation}",
        "dynamics": f"{_layers(ensemble.hidden)}, {ensemble.activation}, {members}",
        "horizon": str(config.rollout.horizon),
        "penalty": f"{config.rollout.penalty_coef} × {config.rollout.penalty}",
        "seed": str(config.seed),
    }


def _layers(hidden: tuple[int, ...]) -> str:
    return " x ".join(map(str, hidden)) or "no hidden layer"


def _plus_minus(summary: Mapping[str, Any], name: str, sign: str) -> str:
    return f"{summary[f'{name}_mean']:.2f} {sign} {summary[f'{name}_std']:.2f}"


def _plain(text: str) -> str:
    """Return a name on one line, without characters that Markdown or a shell obeys."""
    return re.sub(r"[^\w./:+-]+", "-", Path(text).name if text.startswith("/") else text)[:_LONGEST]


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _fenced(language: str, text: str) -> str:
    """Return a block of code. A line of it cannot end the block."""
    return f"```{language}\n{text.replace('```', '')}\n```"


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
