"""Rollouts in bulk: written to one file or to a folder of shards, on this machine or on a Ray cluster.

In the order in which data flow: `plan` describes a folder of shards, `generate` makes the transitions,
`files` reads and writes one shard, `cluster` makes shards on other machines, `write` fills a folder, and
`read` reads it back.
"""

from mopo_fast.utils.lazy import lazy_submodules

__getattr__, __dir__ = lazy_submodules(__name__)
