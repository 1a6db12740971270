"""Rollouts in bulk: written to one file or to a folder of shards, on this machine or on a Ray cluster.

In the order in which data flow: `plan` reads the settings of a run's rollouts, `generate` makes the
transitions, `files` writes one shard, `cluster` makes shards on other machines, `write` fills a folder, and
`read` verifies and summarises it. In `mopo_fast.data`, `manifest` describes a folder and `shards` reads it as
a data set.
"""

from mopo_fast.utils.lazy import lazy_submodules

__getattr__, __dir__ = lazy_submodules(__name__)
