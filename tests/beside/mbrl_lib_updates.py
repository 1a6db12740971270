"""Compare SAC updates on our kernels with mbrl-lib's own; run by test_compat_mbrl_lib_updates.py."""

import copy
import sys
from unittest.mock import MagicMock

# mbrl-lib imports a video library that is not used here.
sys.modules.setdefault("skvideo", MagicMock())
import mbrl.util  # noqa: E402
import mbrl_lib_parts  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from kernel_noise import drawn_by_torch, noise_of  # noqa: E402
from mbrl.third_party.pytorch_sac_pranz24.sac import SAC  # noqa: E402
from mbrl_lib_updates import (  # noqa: E402
    ACT,
    BATCH,
    CASES,
    OBS,
    ROWS,
    assert_equal,
    compare,
    make_arrays,
    make_sac,
)

from mopo_fast import InputError  # noqa: E402
from mopo_fast.compat.mbrl_lib import fuse_sac  # noqa: E402


def make_memory(arrays, rng):
    kind = arrays[0].dtype
    memory = mbrl.util.ReplayBuffer(ROWS, (OBS,), (ACT,), kind, kind, kind, rng=rng)
    memory.add_batch(*arrays)
    return memory


compared = 0
for options in CASES.values():
    compare(SAC, make_memory, **options)
    compared += 1
for options in ({}, {"automatic_entropy_tuning": False, "target_update_interval": 3}):
    compare(SAC, make_memory, updates=14, at_once=7, **options)
    compared += 1

# The stand-ins of the other tests make the same updates.
theirs = make_sac(SAC)
stand_in = make_sac(mbrl_lib_parts.SAC)
for network in ("policy", "critic", "critic_target"):
    getattr(stand_in, network).load_state_dict(getattr(theirs, network).state_dict())
for number in range(4):
    results = []
    for sac, kind in ((theirs, make_memory), (stand_in, mbrl_lib_parts.ReplayBuffer)):
        with drawn_by_torch(noise_of(number, 1, BATCH, ACT)):
            memory = kind(make_arrays(), np.random.default_rng(number))
            results.append(sac.update_parameters(memory, BATCH, number, reverse_mask=True))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)
assert_equal(stand_in, theirs, 1e-5)
compared += 1

# mbrl-lib's own files, logger and deterministic policy.
fused = fuse_sac(make_sac(SAC))
logger = mbrl.util.Logger(".", enable_back_compatible=True)
fused.update_many(
    make_memory(make_arrays(), np.random.default_rng(0)), BATCH, 0, 5, logger, reverse_mask=True
)
logger.dump(5)
fused.save_checkpoint(ckpt_path="sac.pth")
original = make_sac(SAC)
original.load_checkpoint("sac.pth")
original.log_alpha.data.copy_(fused.log_alpha.data)
original.alpha_optim.load_state_dict(copy.deepcopy(fused.alpha_optim.state_dict()))
original.alpha = fused.alpha
assert_equal(original, fused, 0.0)
original.update_parameters(make_memory(make_arrays(), np.random.default_rng(1)), BATCH, 5, logger, True)
observations = make_arrays()[0]
assert np.array_equal(
    fuse_sac(copy.deepcopy(fused)).select_action(observations, batched=True, evaluate=True),
    fused.select_action(observations, batched=True, evaluate=True),
)
try:
    fuse_sac(make_sac(SAC, policy="Deterministic"))
    raise AssertionError("a deterministic policy was taken over")
except (InputError, AttributeError) as error:
    assert isinstance(error, InputError), error
assert torch.get_default_dtype() == torch.float32
print(compared + 1)
