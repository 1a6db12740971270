"""Transitions and buffers for a small SAC."""

import torch
from kernel_cases import random_transitions

from mopo_fast.buffer import RingBuffer
from mopo_fast.config import SACConfig
from mopo_fast.data import Transitions

OBS, ACT, BATCH = 5, 2, 16
CONFIG = SACConfig(hidden=(24, 24), batch_size=BATCH)


def transitions(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Transitions:
    return random_transitions(count, OBS, ACT, seed, dtype)


def filled(count: int) -> RingBuffer:
    buffer = RingBuffer(100, OBS, ACT)
    for array in buffer.storage.arrays().values():
        array.fill_(True if array.dtype == torch.bool else float("nan"))
    buffer.append(transitions(count, seed=2))
    return buffer
