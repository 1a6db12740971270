"""Rollouts in bulk: to one file, or to a folder of shards, here or on a cluster."""
