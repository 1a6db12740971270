"""Policies that a training keeps on its way: policies/policy-UPDATES.safetensors in a run's folder.

They share the run's policy.json, since all policies of a run have the same networks.
"""

import re
from pathlib import Path

from mopo_fast.policy import Actor
from mopo_fast.utils.atomic import refuse_links

FOLDER = "policies"


def keep_policy(out: Path, actor: Actor, updates: int) -> None:
    """Write the policy of a run after `updates` updates, atomically.

    A resumed run that repeats an epoch writes the same bytes again.
    """
    actor.save_tensors(out / FOLDER / f"policy-{updates:07}.safetensors")


def kept_policies(run: Path) -> dict[int, Path]:
    """Return the policies that a run has kept, with their numbers of updates as keys, in order.

    Raises:
        InputError: the folder policies/ is a link.
    """
    refuse_links(run / FOLDER)
    files = (run / FOLDER).glob("policy-*.safetensors")
    names = {path: re.fullmatch(r"policy-(\d{7,})\.safetensors", path.name) for path in files}
    return dict(sorted((int(match[1]), path) for path, match in names.items() if match))
