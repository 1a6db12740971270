"""The trainings of each experiment of docs/results.md."""

from dataclasses import dataclass

HALFCHEETAH, HOPPER, WALKER2D = (
    f"{task}-medium-replay-local" for task in ("halfcheetah", "hopper", "walker2d")
)
HOPPER_RANDOM = "hopper-random-local"

# Options of every training. It keeps the policies after 20, 40, ... epochs of 1000 updates.
_COMMON = {
    "--steps": "100000",
    "--matmul-precision": "medium",
    "--evaluation.interval": "5",
    "--keep-policies": "20",
}


@dataclass(frozen=True)
class Training:
    """One call of `mopo-fast train`, which makes runs that share a fit.

    Attributes:
        folder: the runs' folder, below the study's.
        arguments: arguments of the command, without --out. Paths are below the study's folder.
        seed: seed of the runs.
        runs: folders of the runs, below the study's.
        task_file: file of the task in examples/, which is copied to the study's folder, or None.
    """

    folder: str
    arguments: tuple[str, ...]
    seed: int
    runs: tuple[str, ...]
    task_file: str | None = None


def _training(
    folder: str,
    dataset: str,
    seed: int,
    coefs: tuple[str, ...],
    options: dict[str, str] | None = None,
    *,
    task_file: str | None = None,
) -> Training:
    task = {} if task_file is None else {"--task": task_file}
    every = (part for option in (_COMMON | task | (options or {})).items() for part in option)
    arguments = (dataset, "--seeds", str(seed), "--penalty-coefs", *coefs, *every)
    runs = tuple(f"{folder}/seed{seed}/seed{seed}-coef{coef}" for coef in coefs)
    return Training(f"{folder}/seed{seed}", arguments, seed, runs, task_file)


def parity_training(dataset: str, seed: int, epochs: int) -> Training:
    """Return the training with OfflineRL-Kit's hyperparameters, and its schedule over these epochs."""
    folder = f"parity/{dataset}/seed{seed}/preset"
    options = {
        "--seed": str(seed),
        "--preset": "offlinerl-kit",
        "--steps": f"{1000 * epochs}",
        "--matmul-precision": "highest",
    }
    arguments = (dataset, *(part for option in options.items() for part in option))
    return Training(folder, arguments, seed, (folder,))


def _penalty() -> list[Training]:
    return [
        _training(f"penalty/{dataset}", dataset, seed, ("0", "1"))
        for dataset in (HOPPER, HALFCHEETAH, WALKER2D)
        for seed in range(5)
    ]


def _data_handling() -> list[Training]:
    """Return the trainings that `penalty` lacks."""
    ways: dict[str, dict[str, str]] = {"true-successors": {}, "d4rl": {"--data.compat": "d4rl"}}
    return [
        _training(f"data-handling/{dataset}/{way}", dataset, seed, ("1",), ways[way])
        for dataset, way in ((HOPPER_RANDOM, "true-successors"), (HOPPER_RANDOM, "d4rl"), (HOPPER, "d4rl"))
        for seed in range(3)
    ]


def _sensitivity() -> list[Training]:
    """Return the settings that `penalty` lacks; its fits are shared."""
    coefs = {1: ("0", "1", "5"), 5: ("5",), 10: ("0", "1", "5")}
    return [
        _training(
            f"sensitivity/{HOPPER}/horizon{horizon}",
            HOPPER,
            seed,
            coefs[horizon],
            {
                "--rollout.horizon": str(horizon),
                "--dynamics-from": f"penalty/{HOPPER}/seed{seed}/seed{seed}-coef0",
            },
        )
        for seed in range(3)
        for horizon in coefs
    ]


def _precision() -> list[Training]:
    """Return the float32 twins of the trainings of `penalty` on one data set."""
    return [
        _training(
            f"precision/{HALFCHEETAH}", HALFCHEETAH, seed, ("0", "1"), {"--matmul-precision": "highest"}
        )
        for seed in range(5)
    ]


def _other_domain() -> list[Training]:
    """Return trainings on data of examples/bullet_data.py, in the folder data of the study's."""
    return [
        _training(
            f"other-domain/bullet_{robot}_{tier}",
            f"data/bullet_{robot}_{tier}.npz",
            seed,
            ("0", "1"),
            task_file=f"bullet_{robot}.py",
        )
        for robot in ("hopper", "ant")
        for tier in ("medium", "expert")
        for seed in range(3)
    ]


EXPERIMENTS: dict[str, list[Training]] = {
    "penalty": _penalty(),
    "data-handling": _data_handling(),
    "sensitivity": _sensitivity(),
    "precision": _precision(),
    "other-domain": _other_domain(),
}
"""Trainings of each experiment, in their order."""
