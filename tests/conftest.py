"""One thread per test process: several run at once, and results must not hang on the core count."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
