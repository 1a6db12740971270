"""Adapter for Unifloral (JAX): its dynamics, rollouts and SAC updates on fused kernels, and its files.

In Unifloral's `algorithms/mopo.py`, wrap the dynamics, and replace the train step and the loop around it:

    from mopo_fast.compat import unifloral
    dynamics_model = unifloral.EnsembleDynamics(load_dynamics_model(args.model_path))
    _agent_train_step_fn = unifloral.make_train_step(args, ...)
    (rng, agent_state, rollout_buffer), loss = unifloral.scan(_agent_train_step_fn, ...)

Import the package, not the class: Unifloral's pickles are loaded by the name `EnsembleDynamics` in mopo.py.

JAX is imported only by functions that take JAX arrays. Files are read and written without it. In this
package, "the original" is Unifloral's class or function of the same name.

Source: github.com/EmptyJackson/unifloral, commit f2dc127, algorithms/dynamics.py and mopo.py.
"""

from mopo_fast.compat.unifloral.files import FILES, check_dynamics, check_policy, read, write
from mopo_fast.compat.unifloral.rollouts import LOG_STD_BOUNDS, EnsembleDynamics, make_actor
from mopo_fast.compat.unifloral.updates import make_train_step, scan

__all__ = [
    "FILES",
    "LOG_STD_BOUNDS",
    "EnsembleDynamics",
    "check_dynamics",
    "check_policy",
    "make_actor",
    "make_train_step",
    "read",
    "scan",
    "write",
]
