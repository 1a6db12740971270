"""Adapter for the MOPO authors' code (TensorFlow 1): its `FakeEnv` and SAC updates on kernels, and its files.

In the authors' `mopo/algorithms/mopo.py`, import `FakeEnv` from here, and let the kernels make the updates at
the end of `MOPO._build`:

    from mopo_fast.compat.mopo_tf import FakeEnv, fuse_updates
    fuse_updates(self)

In this package, "the original" is the authors' own class or method of the same name.

Source: github.com/tianheyu927/mopo, commit e5efe3e: mopo/models/fake_env.py, bnn.py, constructor.py,
mopo/algorithms/mopo.py, mopo/static/, softlearning/.
"""

from mopo_fast.compat.mopo_tf.fake_env import FakeEnv, StepInfo, do_without_triton, from_bnn
from mopo_fast.compat.mopo_tf.files import FILES, check_dynamics, check_policy, read, write
from mopo_fast.compat.mopo_tf.updates import fuse_updates

__all__ = [
    "FILES",
    "FakeEnv",
    "StepInfo",
    "check_dynamics",
    "check_policy",
    "do_without_triton",
    "from_bnn",
    "fuse_updates",
    "read",
    "write",
]
