"""Rollouts in bulk: to one file, or to a folder of shards, on this machine or on a cluster.

In the order in which data flow: `plan` says what is made, `generate` makes it, `files` is one shard on disk,
`cluster` spreads shards over machines, `write` fills a folder, `read` reads it back.
"""
