"""Train, and log every epoch to Weights & Biases.

    pip install wandb
    python examples/wandb_logging.py hopper-medium-v2 --out runs/wandb --project mopo

`train(..., on_epoch=)` calls a function with each row of progress.csv, so any other logger is fed in the same
way. A run that was stopped goes on with `--resume`, in W&B too.
"""

import argparse
import dataclasses

import mopo_fast


def log_to(run):
    """Return a function that logs a row of progress.csv to a run of W&B."""

    def log(row):
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        # An epoch without an evaluation has no return and no score.
        run.log(numbers, step=row["updates"])

    return log


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", help="name or file of the data set")
    parser.add_argument("--task", help="task, if the data set's name does not begin with it")
    parser.add_argument("--steps", type=int, default=1_000_000, help="SAC updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/wandb", help="folder of the run")
    parser.add_argument("--project", default="mopo", help="project of W&B")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    options = parser.parse_args(arguments)

    import wandb

    config = mopo_fast.TrainConfig(options.dataset, task=options.task, steps=options.steps, seed=options.seed)
    with wandb.init(
        project=options.project,
        id=options.out.replace("/", "-"),
        resume="allow",
        config=dataclasses.asdict(config),
    ) as run:
        summary = mopo_fast.train.train(config, options.out, resume=options.resume, on_epoch=log_to(run))
        run.summary.update({name: summary[name] for name in ("score_mean", "return_mean")})


if __name__ == "__main__":
    main()
