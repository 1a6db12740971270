"""Every reader of checkpoints succeeds or raises one `InputError`, whatever the file contains."""

import io
import json
import pickle
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import members_of, opcodes, zipped
from places import RECORDED

from mopo_fast import Actor, EnsembleDynamics, InputError
from mopo_fast.compat import (
    Checkpoint,
    convert_checkpoint,
    get_format,
    matlab_files,
    offlinerl_kit,
    polixir,
)
from mopo_fast.config import CHECKPOINT_FORMATS, CheckpointFormat, Hints
from mopo_fast.utils.tensors import load_tensors, save_tensors


def dynamics(**declared: Any) -> EnsembleDynamics:
    generator = torch.Generator().manual_seed(0)
    return EnsembleDynamics(3, 2, members=3, elites=2, hidden=(6, 6), generator=generator, **declared)


def read(name: CheckpointFormat, path: Path) -> str:
    """Return the message of a file that is refused, or an empty string if it is read."""
    hints = Hints(activation="silu") if name == "mbrl-lib" else Hints()
    try:
        checkpoint = get_format(name).read(path, hints)
    except InputError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 1000
        return message
    for model in (checkpoint.dynamics, checkpoint.policy):
        for tensor in [] if model is None else model.state_dict().values():
            assert bool(torch.isfinite(tensor).all())
            assert tensor.dtype in (torch.float32, torch.int64)
    return ""


# --- state dicts


def changes(tensor: torch.Tensor) -> dict[str, Any]:
    """Return replacements for a tensor, named by kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = tensor.float().reshape(-1)
        return {
            "ints": tensor.to(torch.int64) + 7,
            "complex": tensor.to(torch.complex64),
            "bools": tensor > 0,
            "nan": torch.full_like(tensor.float(), torch.nan),
            "infinite in float32": torch.full(tensor.shape, 1e300, dtype=torch.float64),
            "flat": flat,
            "more dimensions": tensor[None],
            "number": torch.tensor(1.0),
            "empty": torch.empty(0),
            "empty and wide": torch.empty(0, 1 << 19),
            "expanded": torch.zeros(1).expand(tensor.shape),
            "sparse": tensor.float().to_sparse() if tensor.ndim else torch.ones(2).to_sparse(),
            "quantized": torch.quantize_per_tensor(flat, 0.1, 0, torch.qint8),
            "meta": torch.empty(tensor.shape, device="meta"),
            "wider": torch.cat([tensor, tensor], -1) if tensor.ndim else torch.zeros(2),
            "list": flat.tolist(),
            "none": None,
            "text": "a",
            "list in lists": [[[]]],
        }


# Kinds that are refused for every tensor.
NEVER = {"nan", "infinite in float32", "expanded", "sparse", "quantized", "meta", "complex"}
NEVER |= {"list", "none", "text", "list in lists"}


@pytest.mark.parametrize(
    "name", ["offlinerl-kit", "offlinerl-kit policy", "mbrl-lib", "d3rlpy", "d3rlpy policy"]
)
def test_state_dicts(name: str, tmp_path: Path) -> None:
    """Each replacement of a tensor is refused or has no effect."""
    code: Any = name.removesuffix(" policy")
    path = tmp_path / "model.pt" if code == "d3rlpy" else tmp_path
    if name == "d3rlpy policy":
        actor, state = Actor(3, 2, hidden=(6,)), {}
        for prefix, weight, bias in (
            ("_encoder._fcs.0", actor.weights[0].T, actor.biases[0]),
            ("_mu", actor.weights[1].T[:2], actor.biases[1][:2]),
            ("_logstd", actor.weights[1].T[2:], actor.biases[1][2:]),
        ):
            state |= {f"{prefix}.weight": weight.detach().clone(), f"{prefix}.bias": bias.detach().clone()}
        torch.save({"_policy": state}, path)
    elif name == "offlinerl-kit policy":
        shutil.copy(RECORDED / "offlinerl_kit" / "policy.pth", tmp_path)
    else:
        model = dynamics(log_scale="std" if code == "d3rlpy" else "variance")
        get_format(code).write(Checkpoint(model), path)
    file = {"mbrl-lib": "model.pth", "d3rlpy": "model.pt", "offlinerl-kit": "dynamics.pth"}.get(name, "")
    file = file or ("policy.pth" if code == "offlinerl-kit" else "model.pt")
    content = torch.load(tmp_path / file, weights_only=True)
    content.pop("_optim", None)
    inside = {"mbrl-lib": "state_dict", "d3rlpy": "_dynamics", "d3rlpy policy": "_policy"}.get(name)
    state = content[inside] if inside else content
    assert read(code, path) == ""
    refused = 0
    for key, tensor in list(state.items()):
        # Skip all but one layer of each kind and one member, to save time.
        if key.startswith(("critic", "backbones.1", "hidden_layers.1", "_models.1", "_models.2")):
            continue
        if "saved_" in key and key != "output_layer.saved_bias":
            continue
        # A tensor that the model does not use may have any finite value.
        used = key.startswith("actor") if "kit policy" in name else "saved_" not in key and key != "elites"
        for kind, other in changes(tensor).items():
            state[key] = other
            torch.save(content, tmp_path / file)
            message = read(code, path)
            refused += bool(message)
            never = kind in NEVER and (kind != "expanded" or tensor.numel() > 1)
            of_other_kind = used and kind in ("ints", "bools", "number", "empty")
            assert message or not (never or of_other_kind), (key, kind)
        state[key] = tensor
    assert refused
    for other_key in (1, None, 2.5, b"a"):
        more = {**state, other_key: torch.zeros(1)}
        torch.save({**content, inside: more} if inside else more, tmp_path / file)
        assert "is not a state dict" in read(code, path)


@pytest.mark.parametrize("name", ["offlinerl-kit", "mbrl-lib"])
def test_elites(name: CheckpointFormat, tmp_path: Path) -> None:
    get_format(name).write(Checkpoint(dynamics()), tmp_path)
    file, key = ("model.pth", "elite_models") if name == "mbrl-lib" else ("dynamics.pth", "elites")
    content = torch.load(tmp_path / file, weights_only=True)
    wrong: list[Any] = [[], [3], [-1], [0, 0], [0.0, 1.0], [[0], [1]], [True], [1 << 40]]
    if name == "mbrl-lib":
        deep: list[Any] = []
        for _ in range(200):
            deep = [deep, deep]
        wrong += [[1 << 100], "01", 1, {0: 1}, deep, [None], [0, "1"], torch.tensor([0.5]), torch.tensor(1)]
    for elites in wrong:
        content[key] = torch.tensor(elites) if name == "offlinerl-kit" else elites
        torch.save(content, tmp_path / file)
        assert "elites must be" in read(name, tmp_path), elites


# --- d3rlpy's scalers


def standard(change: dict[str, Any]) -> dict[str, Any]:
    return {"type": "standard", "params": {"mean": [0.0, 1, 2], "std": [1.0, 2, 3], "eps": 0.001} | change}


SCALER = standard({})
MULTIPLY = {"type": "multiply", "params": {"multiplier": 2.0}}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scaler": SCALER, "reward_scaler": MULTIPLY, "gamma": [None, {"a": 1}]}, ""),
        ({}, ""),
        ([], "params.json: the whole"),
        (None, "params.json: the whole"),
        ({"scaler": []}, "params.json: scaler"),
        ({"scaler": {"type": "standard"}}, "scaler.params: Field required"),
        ({"scaler": {"type": None, "params": {}}}, "scaler.type: Input"),
        ({"scaler": {"type": ["standard"], "params": {}}}, "scaler.type: Input"),
        ({"scaler": {"type": "pixel", "params": {}}}, "scaler pixel cannot be part of a model"),
        ({"scaler": {"type": "standard", "params": {}}}, "scaler has 0 numbers in mean, expected 3"),
        ({"scaler": standard({"mean": None})}, "has 0 numbers in mean"),
        ({"scaler": standard({"mean": [1.0, 2.0]})}, "has 2 numbers in mean"),
        ({"scaler": standard({"mean": [[1], [2], [3]]})}, "params.json: scaler"),
        ({"scaler": standard({"mean": "abc"})}, "params.json: scaler"),
        ({"scaler": standard({"mean": [True] * 3})}, "params.json: scaler"),
        ({"scaler": standard({"std": [1.0, 0, 1], "eps": 0})}, "scales above 0"),
        ({"scaler": standard({"std": [1.0, -2, 1]})}, "scales above 0"),
        ({"scaler": standard({"std": [1e300] * 3})}, "finite numbers"),
        ({"scaler": standard({"std": [10**400] * 3})}, "params.json"),
        ({"scaler": standard({"std": [1e-300] * 3, "eps": 0})}, "scales above 0"),
        ({"action_scaler": SCALER}, "action_scaler standard cannot be part of a model: only min_max"),
        ({"action_scaler": {"type": "min_max", "params": {"minimum": [1, 1], "maximum": [1, 1]}}}, "above 0"),
        ({"action_scaler": {"type": "min_max", "params": {"minimum": [-3e38], "maximum": [3e38]}}}, ""),
        ({"reward_scaler": {"type": "multiply", "params": {"multiplier": 0}}}, "finite numbers"),
        ({"reward_scaler": {"type": "multiply", "params": {"multiplier": -1}}}, "scales above 0"),
        ({"reward_scaler": {"type": "multiply", "params": {"multiplier": [1, 2]}}}, "has 2 numbers in mult"),
        ({"reward_scaler": {"type": "clip", "params": {"low": 0}}}, "reward_scaler clip cannot be part"),
    ],
)  # fmt: skip
def test_scalers_of_d3rlpy(parameters: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    get_format("d3rlpy").write(Checkpoint(dynamics(log_scale="std")), path)
    (tmp_path / "params.json").write_text(json.dumps(parameters))
    found = read("d3rlpy", path)
    assert message in found and bool(message) == bool(found)


def test_params_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    get_format("d3rlpy").write(Checkpoint(dynamics(log_scale="std")), path)
    for text in ("", "{", "[" * 200_000, '{"scaler": NaN}', '{"scaler": 1e999}', "\xff", "9" * 10_000):
        (tmp_path / "params.json").write_text(text)
        assert "params.json is not a readable JSON file" in read("d3rlpy", path)


# --- NumPy's and MATLAB's files


def npy(header: str, content: bytes = bytes(40)) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 5)}"), ""),
        (npy("{'descr': '>f8', 'fortran_order': True, 'shape': (1, 5)}"), ""),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 4)}"), "input_mean has 4 values"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}", b""), "input_mean has 0 values"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"), "not a whole .npy file"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 8)}"), "not a whole"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"), "not a whole .npy file"),
        (npy("{'descr': '<f8', 'fortran_order': False, 'shape': 5}"), "not a whole .npy file"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (5,)}"), "not a whole .npy file"),
        (npy("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (5,)}"), "must hold finite floats"),
        (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (5,)}"), "must hold finite floats"),
        (npy("{'descr': '<c8', 'fortran_order': False, 'shape': (5,)}"), "must hold finite floats"),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (5,)}", b"\xff" * 40),
            "must hold finite floats",
        ),
        (
            npy("{'descr': '<f8', 'fortran_order': False, 'shape': (5,)}", struct.pack("<5d", *[1e300] * 5)),
            "finite",
        ),
        (npy("__import__('os').system('touch ran')"), "not a whole .npy file"),
        (npy("[" * 110), "not a whole .npy file"),
        (b"\x93NUMPY\3\0", "not a whole .npy file"),
        (b"", "not a whole .npy file"),
        (zipped({"a.npy": b""}), "not a whole .npy file"),
        (pickle.dumps([1]), "not a whole .npy file"),
    ],
)
def test_npy_files(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("dynamics.pth", "mu.npy", "std.npy"):
        shutil.copy(RECORDED / "offlinerl_kit" / name, tmp_path)
    (tmp_path / "mu.npy").write_bytes(content)
    found = read("offlinerl-kit", tmp_path)
    assert message in found and bool(message) == bool(found)


@pytest.mark.parametrize("std", [[0.0] * 5, [-1.0] * 5, [1, 1, 1, 1, 1e-60]])
def test_scales_that_divide_by_nothing(std: list[float], tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "offlinerl_kit", tmp_path, dirs_exist_ok=True)
    np.save(tmp_path / "std.npy", np.array([std]))
    assert "input_std must be positive everywhere" in read("offlinerl-kit", tmp_path)
    get_format("mbrl-lib").write(Checkpoint(dynamics()), tmp_path / "mbrl")
    scale = {"mean": np.zeros((1, 5)), "std": np.array([std])}
    (tmp_path / "mbrl" / "env_stats.pickle").write_bytes(pickle.dumps(scale))
    assert "input_std must be positive everywhere" in read("mbrl-lib", tmp_path / "mbrl")


def test_env_stats_of_mbrl_lib(tmp_path: Path) -> None:
    get_format("mbrl-lib").write(Checkpoint(dynamics()), tmp_path)
    one = np.ones((1, 5))
    for wrong in ([], None, {"mean": one}, {"mean": one, "std": None}, {"mean": one, "std": "a"},
                  {"mean": one, "std": one.astype(int)}, {"mean": one, "std": one[:, :4]},
                  {"mean": one, "std": [[1.0] * 5] * 2}, {"mean": one, "std": one * 1e300},
                  {"mean": one, "std": one.astype(complex)}, {"mean": {"a": one}, "std": one}):  # fmt: skip
        (tmp_path / "env_stats.pickle").write_bytes(pickle.dumps(wrong))
        assert read("mbrl-lib", tmp_path), wrong
    for right in (one[0], one.astype(">f4"), one.tolist(), np.asfortranarray(one)[:, ::-1]):
        (tmp_path / "env_stats.pickle").write_bytes(pickle.dumps({"mean": one, "std": right}))
        assert read("mbrl-lib", tmp_path) == ""


def mat(arrays: dict[str, Any], **options: Any) -> bytes:
    from scipy.io import savemat

    content = io.BytesIO()
    savemat(content, arrays, **options)
    return content.getvalue()


def test_matlab_files(tmp_path: Path) -> None:
    from scipy.io import loadmat
    from scipy.sparse import csc_array

    path = tmp_path / "BNN_0.mat"
    source = RECORDED / "mopo_tf" / "heads2_0.mat"
    arrays = {name: array for name, array in loadmat(source).items() if name.isdecimal()}

    def refused(content: bytes) -> str:
        path.write_bytes(content)
        return read("mopo-tf", path)

    assert refused(mat(arrays)) == "" == refused(mat(arrays | {"other": ["cells"]}))
    for wrong, message in (
        (csc_array(np.eye(3)), "the array 0 is no matrix of real floats"),
        ({"a": 1.0}, "is no matrix of real floats"),
        (np.array([np.eye(2), "x"], object), "is no matrix of real floats"),
        ("text", "is no matrix of real floats"),
        (np.arange(3), "is no matrix of real floats"),
        (np.array([True]), "is no matrix of real floats"),
        (np.ones((1, 3)) * 1j, "is no matrix of real floats"),
        (np.full((1, 5), np.nan), "not finite"),
        (np.full((1, 5), 1e300), "not finite"),
        (np.ones((1, 9)), "do not fit its layers"),
        (np.ones((2, 3, 4, 5)), "do not fit its layers"),
        (np.ones((0, 0)), "do not fit its layers"),
    ):
        assert message in refused(mat(arrays | {"0": wrong})), message
    assert "compressed" in refused(mat(arrays, do_compression=True))
    assert "its version is not 5, 6 or 7" in refused(mat({"0": np.eye(2)}, format="4"))
    sound = mat(arrays)
    version = sound[:124] + b"\0\2" + sound[126:]
    assert "BNN_0.mat" in refused(version)
    # The file declares huge dimensions and a huge size of its first matrix.
    dims = sound.index(struct.pack("<II", 5, 8)) + 8
    huge = sound[:dims] + struct.pack("<ii", 1 << 20, 1 << 20) + sound[dims + 8 :]
    assert "but its shape holds" in refused(huge)
    longer = sound[:132] + struct.pack("<I", (1 << 32) - 1) + sound[136:]
    assert "is not a whole MATLAB file" in refused(longer)
    random, failed = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(3):
            damaged[random.integers(400)] = random.integers(256)
        failed += bool(refused(bytes(damaged)))
    assert failed > 100


def test_matlab_files_as_scipy_reads_them(tmp_path: Path) -> None:
    from scipy.io import loadmat

    made = {
        "a": np.arange(6.0).reshape(2, 3),
        "named_longer": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "one": 2.5,
        "none": np.zeros((0, 3)),
    }
    (tmp_path / "made.mat").write_bytes(mat(made))
    for path in (tmp_path / "made.mat", *sorted((RECORDED / "mopo_tf").glob("*.mat"))):
        found, expected = matlab_files.load(path), loadmat(path)
        assert found.keys() == {name for name in expected if not name.startswith("__")}
        for name, array in found.items():
            assert array.dtype == expected[name].dtype and np.array_equal(array, expected[name])
    # A big-endian file, with numbers stored as small integers.
    flags = struct.pack(">IIII", 6, 8, 6, 0) + struct.pack(">IIii", 5, 8, 1, 3)
    body = flags + struct.pack(">HH4s", 1, 1, b"x") + struct.pack(">HH4s", 3, 2, b"\1\2\3")
    (tmp_path / "a.mat").write_bytes(bytes(124) + b"\1\0MI" + struct.pack(">II", 14, len(body)) + body)
    assert matlab_files.load(tmp_path / "a.mat")["x"].tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match="does not exist"):
        matlab_files.load(tmp_path)


def test_layers_that_do_not_fit_take_no_memory(tmp_path: Path) -> None:
    """If they were accepted, arrays of 1 x 30,000 numbers would make a layer of 30,000 x 30,000."""
    wide = 30_000
    arrays = [np.zeros((1, 5)), np.ones((1, 5))]
    for shape in ((1, 5, wide), (1, wide), (1, 1, wide), (1, wide), (1, 1, 8), (1, 8)):
        arrays.append(np.zeros(shape if len(shape) == 3 else (1, *shape)))
    arrays += [np.zeros((1, 4)), np.zeros((1, 4))]
    (tmp_path / "a.mat").write_bytes(mat({str(i): array for i, array in enumerate(arrays)}))
    assert "the one before has" in read("mopo-tf", tmp_path / "a.mat")
    weights = [np.zeros((3, wide)), np.zeros(wide), np.zeros((1, wide)), np.zeros(wide)]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"policy_weights": weights}))
    assert "the one before has" in read("mopo-tf", tmp_path / "a.pkl")
    dynamics().save(tmp_path)
    tensors = load_tensors(tmp_path / "dynamics.safetensors")
    tensors |= {"weight_0": torch.zeros(3, 5, wide), "weight_1": torch.zeros(3, 1, wide)}
    save_tensors(tmp_path / "dynamics.safetensors", tensors)
    assert "the one before has" in read("mopo-fast", tmp_path)


def test_structure_files(tmp_path: Path) -> None:
    shutil.copy(RECORDED / "mopo_tf" / "heads2_0.mat", tmp_path / "a.mat")
    (tmp_path / "a.nns").write_bytes(b"a" * (1 << 21))
    assert "must be a text file of at most" in read("mopo-tf", tmp_path / "a.mat")
    (tmp_path / "a.nns").unlink()
    (tmp_path / "a.nns").mkdir()
    assert "must be a text file of at most" in read("mopo-tf", tmp_path / "a.mat")


# --- pickled modules


def test_modules_that_hold_each_other(tmp_path: Path) -> None:
    """A module may contain itself, or contain another one twice at each of sixty levels."""
    module = b"cother\nThing\n)R}(" + opcodes("_parameters") + b"}" + opcodes("_buffers") + b"}"
    module += opcodes("_modules")

    def refused(content: bytes) -> str:
        data = zipped({"a/data.pkl": b"\x80\x02" + content + b"."})
        (tmp_path / "a.pt").write_bytes(data)
        return read("polixir", tmp_path / "a.pt")

    content = module + b"}ub"
    for _ in range(60):
        content = content + b"q\0" + module + b"}(" + opcodes("a") + b"h\0" + opcodes("b") + b"h\0uub"
    assert "it holds a Thing" in refused(content)
    inside_itself = b"cother\nThing\n)Rq\0}(" + opcodes("_parameters") + b"}" + opcodes("_buffers") + b"}"
    assert "it holds a Thing" in refused(
        inside_itself + opcodes("_modules") + b"}" + opcodes("a") + b"h\0sub"
    )
    deep = (module + b"}" + opcodes("a")) * 30_000 + b"N" + b"sub" * 30_000
    assert "is no EnsembleTransition" in refused(deep)


def test_damaged_modules(tmp_path: Path) -> None:
    """Damaged pickles in an undamaged zip file are read or raise `InputError`."""
    random = np.random.default_rng(0)
    for name in ("normalize.pt", "policy.pt"):
        members = members_of((RECORDED / "polixir" / name).read_bytes())
        key = next(member for member in members if member.endswith("data.pkl"))
        whole = members[key]
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(2):
                damaged[random.integers(len(damaged))] = random.integers(256)
            (tmp_path / "a.pt").write_bytes(zipped(members | {key: bytes(damaged)}))
            read("polixir", tmp_path / "a.pt")


def test_biases_that_would_broadcast(tmp_path: Path) -> None:
    model = polixir.read(RECORDED / "polixir" / "local.pt").dynamics
    assert model is not None
    module = polixir._transition(model)
    module.output_layer.bias = torch.nn.Parameter(torch.zeros(4, 1, 1))  # type: ignore[union-attr]
    torch.save(module, tmp_path / "a.pt", pickle_module=polixir._PickleModule)
    assert "expected floats of shape [4, 8]" in read("polixir", tmp_path / "a.pt")


def test_damaged_pickles_of_unifloral(tmp_path: Path) -> None:
    random, whole = np.random.default_rng(0), (RECORDED / "unifloral.pkl").read_bytes()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[random.integers(len(damaged))] = random.integers(256)
        (tmp_path / "a.pkl").write_bytes(damaged)
        read("unifloral", tmp_path / "a.pkl")


def test_damaged_safetensors(tmp_path: Path) -> None:
    dynamics().save(tmp_path)
    Actor(3, 2, hidden=(4,)).save(tmp_path)
    random = np.random.default_rng(0)
    for name in ("dynamics.safetensors", "policy.safetensors", "dynamics.json", "policy.json"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(2):
                damaged[random.integers(min(len(damaged), 600))] = random.integers(256)
            (tmp_path / name).write_bytes(damaged)
            read("mopo-fast", tmp_path)
        (tmp_path / name).write_bytes(whole)


# --- nothing is left behind


@pytest.mark.parametrize("target", CHECKPOINT_FORMATS)
@pytest.mark.parametrize("good", ["dynamics", "policy", "neither"])
def test_a_refused_conversion_leaves_nothing(target: CheckpointFormat, good: str, tmp_path: Path) -> None:
    """Test that no file is written if the other code cannot store one of the models unchanged."""
    scale = "std" if target in ("d3rlpy", "polixir") else "variance"
    right: dict[str, Any] = {"log_scale": scale, "activation": "relu" if target == "unifloral" else "silu"}
    wrong: dict[str, Any] = {**right, "member_bounds": True, "absolute": [0]}
    low = {"mopo-tf": -20.0}.get(target, -5.0)
    run, out = tmp_path / "run", tmp_path / "out" / "hopper.pkl"
    dynamics(**(right if good == "dynamics" else wrong)).save(run)
    actor = Actor(3, 2, hidden=(6, 6), log_std_min=low if good == "policy" else -7.0)
    actor.save(run)
    try:
        convert_checkpoint(run, out, "mopo-fast", target, strict=True)
    except InputError:
        assert not (tmp_path / "out").exists()
    else:
        # Our own format represents every model.
        assert target == "mopo-fast"


@pytest.mark.parametrize("target", ["d3rlpy", "unifloral"])
def test_scales_that_do_not_fit_into_a_layer(target: CheckpointFormat, tmp_path: Path) -> None:
    scale = "std" if target == "d3rlpy" else "variance"
    model = dynamics(log_scale=scale, activation="relu")
    model.input_std.fill_(1e-44)
    with pytest.raises(InputError, match="scales of its inputs are too small"):
        get_format(target).write(Checkpoint(model), tmp_path / "hopper.pkl")
    assert not list(tmp_path.iterdir())


# --- arrays that OfflineRL-Kit's class takes


def test_arrays_that_the_original_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """OfflineRL-Kit passes inputs to NumPy first, so it accepts any memory order, byte order and dtype."""
    from test_compat_offlinerl_kit import make_dynamics

    values = np.arange(-6, 6, dtype=np.float32).reshape(4, 3)
    actions = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
    made = make_dynamics()
    scaler = made.scaler

    def original(obs: Any, action: Any) -> np.ndarray[Any, Any]:
        """Return the network inputs that the original computes; raise if it could not add the observation."""
        inputs = (np.concatenate([obs, action], axis=-1) - scaler.mu) / scaler.std
        mean = torch.as_tensor(inputs, dtype=torch.float32).numpy().copy()
        mean[..., :3] += obs
        return torch.as_tensor(inputs, dtype=torch.float32).numpy()

    def ours(obs: Any, action: Any) -> np.ndarray[Any, Any]:
        np.random.seed(0)
        return made.step(obs, action)[0]

    fixed = values.copy()
    fixed.flags.writeable = False
    same = [
        values[::-1].copy()[::-1],
        values[:, ::-1].copy()[:, ::-1],
        values.astype(">f4"),
        values.astype(">f8"),
        values.astype(np.int64),
        values.astype(">i2"),
        values.astype(np.float16),
        np.asfortranarray(values),
        np.repeat(values, 2, 0)[::2],
        fixed,
        values.tolist(),
    ]
    for obs in same:
        np.testing.assert_allclose(original(obs, actions), original(values, actions), rtol=1e-6)
        assert np.array_equal(ours(obs, actions), ours(values, actions))
    for action in (actions[::-1].copy()[::-1], actions.astype(">f4"), actions.astype(">f8")):
        assert np.array_equal(ours(values, action), ours(values, actions))
    shared = offlinerl_kit.files.as_floats(values)
    assert shared.data_ptr() == values.ctypes.data
    # The scaler's arrays may have any memory order, byte order and dtype, too.
    for attribute in ("mu", "std"):
        array = np.asarray(getattr(scaler, attribute), np.float32)
        expected = ours(values, actions)
        monkeypatch.setattr(scaler, attribute, array.astype(">f8")[:, ::-1].copy()[:, ::-1])
        np.testing.assert_allclose(ours(values, actions), expected, rtol=1e-5)


def test_data_that_the_original_trains_on() -> None:
    values = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    data = {
        "observations": values[::-1],
        "actions": values[:, :2].astype(">f4"),
        "next_observations": values.astype(int),
        "rewards": values[::-1, :1],
        "terminals": np.array([[0], [1], [0], [1]])[::-1],
    }
    made = offlinerl_kit.dynamics._transitions(data)
    assert np.array_equal(made.observations, values[::-1]) and np.array_equal(made.actions, values[:, :2])
    assert made.rewards.tolist() == [9, 6, 3, 0] and made.terminals.tolist() == [True, False, True, False]


def test_sparse_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that take few bytes on disk but more memory than is available are refused."""
    header = json.dumps({"a": {"dtype": "F64", "shape": [1 << 17], "data_offsets": [0, 1 << 20]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    np.save(tmp_path / "mu.npy", np.zeros(1 << 17))
    with open(tmp_path / "a.safetensors", "r+b") as file:
        file.truncate(8 + len(header) + (1 << 20))
    monkeypatch.setattr("mopo_fast.utils.machine.available_memory", lambda: (2 << 20) - 1)
    with pytest.raises(
        InputError,
        match=r"a\.safetensors would take [\d.]+ (bytes|KiB|MiB|GiB), cpu has [\d.]+ (bytes|KiB|MiB)",
    ):
        load_tensors(tmp_path / "a.safetensors")
    with pytest.raises(
        InputError, match=r"mu\.npy would take [\d.]+ (bytes|KiB|MiB|GiB), cpu has [\d.]+ (bytes|KiB|MiB)"
    ):
        offlinerl_kit.files.load_array(tmp_path / "mu.npy")
