"""Record Polixir's OfflineRL on small models: `python tests/recorded/polixir.py CHECKOUT`.

CHECKOUT is one of polixir/OfflineRL. Recorded at its commit a7db458 with torch 2.13.0 and NumPy 2.4.6 on
Python 3.11.
"""

import sys
import types
from pathlib import Path

import numpy as np
import torch

OBS, ACT, ROWS, DRAWS = 3, 2, 24, 2000
TARGET = Path(__file__).parent / "polixir"
MODES = ("local", "normalize", "global")


def main(checkout):
    # The package itself imports every algorithm and its logger; of scikit-learn nothing is used here.
    for name in ("offlinerl", "sklearn", "sklearn.preprocessing"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["offlinerl"].__path__ = [f"{checkout}/offlinerl"]
    sys.modules["sklearn.preprocessing"].MinMaxScaler = None
    from offlinerl.utils.net.common import Net
    from offlinerl.utils.net.model.ensemble import EnsembleTransition
    from offlinerl.utils.net.tanhpolicy import TanhGaussianPolicy

    TARGET.mkdir(exist_ok=True)
    torch.manual_seed(0)
    obs = torch.randn(ROWS, OBS) * torch.tensor([0.5, 3.0, 1.0]) + 2.0
    inputs = torch.cat((obs, torch.rand(ROWS, ACT) * 2.0 - 1.0), -1)
    arrays = {"inputs": inputs.numpy()}
    for mode in MODES:
        transition = EnsembleTransition(OBS, ACT, 8, 2, ensemble_size=4, mode=mode)
        with torch.no_grad():
            for parameter in transition.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        transition.update_self(obs)
        transition.update_save([0, 1, 2, 3])
        transition.set_select([2, 0])
        torch.save(transition, TARGET / f"{mode}.pt")
        with torch.no_grad():
            normal = transition(inputs)
        arrays |= {f"{mode} mean": normal.mean.numpy(), f"{mode} std": normal.stddev.numpy()}
    # As the loop of train_policy draws: all members' samples, then one member of each row.
    with torch.no_grad():
        samples = transition(inputs[:1].repeat(DRAWS, 1)).sample()
    np.random.seed(0)
    drawn = np.random.randint(0, 2, size=DRAWS)
    arrays |= {"drawn": drawn.astype(np.uint8), "samples": samples[drawn, np.arange(DRAWS)].numpy()}
    net = Net(layer_num=1, state_shape=OBS, hidden_layer_size=8)
    policy = TanhGaussianPolicy(
        preprocess_net=net, action_shape=ACT, hidden_layer_size=8, conditioned_sigma=True
    )
    with torch.no_grad():
        # So that the bounds of the log std are felt.
        policy.sigma.weight *= 20.0
        normal = policy(obs).normal
        arrays |= {"policy mean": normal.mean.numpy(), "policy std": normal.stddev.numpy()}
        arrays["actions"] = policy.policy_infer(obs).numpy()
    torch.save(policy, TARGET / "policy.pt")
    np.savez_compressed(TARGET / "record.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
