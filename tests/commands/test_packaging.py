"""Test the installed package: one version, lazy imports, and sources from which a wheel can be built."""

import importlib.metadata
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

import mopo_fast
from mopo_fast.backends import cpu

# Instruction sets of the CPU kernels, besides "portable".
X86 = ("avx2", "avx512", "avx512_bf16", "avx512_amx")
ARM = ("neon", "neon_bf16")


def test_every_public_name_is_there() -> None:
    for name in mopo_fast.__all__:
        assert getattr(mopo_fast, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = mopo_fast.nothing
    with pytest.raises(AttributeError, match=r"'mopo_fast\.data' has no attribute 'nothing'"):
        _ = mopo_fast.data.nothing


def test_tab_completion_shows_the_public_names_and_modules() -> None:
    names = dir(mopo_fast)
    assert set(mopo_fast.__all__) < set(names)
    assert {"bulk", "compat", "data", "evaluate", "train"} < set(names)
    assert not {"Any", "TYPE_CHECKING", "importlib", "_cpu", "_version"} & set(names)
    assert {"convert", "load_dataset"} < set(dir(mopo_fast.data))


def test_editors_see_the_modules() -> None:
    source = (ROOT / "mopo_fast" / "__init__.py").read_text()
    for name in re.findall(r"from mopo_fast import (\w+) as", source):
        assert name in dir(mopo_fast)


@pytest.mark.parametrize(
    "name",
    ["train.train", "evaluate.evaluate", "data.convert.convert", "compat.native.read", "data.shards.Rollouts",
     "run.population.train_many", "backends.reference.act", "collect.collect"],
)  # fmt: skip
def test_modules_are_imported_on_first_use(name: str) -> None:
    check = (
        "import sys, mopo_fast\n"
        "if 'torch' in sys.modules or 'numpy' in sys.modules: sys.exit('imported too early')\n"
        f"sys.exit(not callable(mopo_fast.{name}))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize(
    ("option", "device", "expected"),
    [
        (None, None, "0"),
        (None, "nvidiactl", "0"),
        (None, "nvidia0", "auto"),
        (None, "dxg", "auto"),
        ("1", None, "1"),
        ("0", "nvidia0", "0"),
    ],
)
def test_cuda_is_built_where_a_gpu_is_or_on_request(
    option: str | None, device: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", lambda **_: None)
    monkeypatch.delenv("MOPO_FAST_CUDA", raising=False)
    if option is not None:
        monkeypatch.setenv("MOPO_FAST_CUDA", option)
    if device is not None:
        (tmp_path / device).touch()
    assert runpy.run_path(str(ROOT / "setup.py"))["cuda_option"](tmp_path) == expected


@pytest.fixture
def find_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str | None]:
    """The function of setup.py."""
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", lambda **_: None)
    monkeypatch.delenv("CXX", raising=False)
    found: Callable[[], str | None] = runpy.run_path(str(ROOT / "setup.py"))["find_compiler"]
    return found


def test_the_compiler_of_the_installation(
    find_compiler: Callable[[], str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler() is None
    for name in ("clang++", "g++"):
        (tmp_path / name).touch(mode=0o755)
        assert find_compiler() == str(tmp_path / name)
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++")
    assert find_compiler() == str(tmp_path / "clang++")
    monkeypatch.setenv("CXX", "walrus++")
    with pytest.raises(SystemExit, match=r"CXX=walrus\+\+ is not there; name another compiler, or none"):
        find_compiler()


def test_another_compiler_builds_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("setuptools"), "setup", lambda **_: None)
    monkeypatch.delenv("CXX", raising=False)
    origin = runpy.run_path(str(ROOT / "setup.py"))["origin"]
    compiler, numbers = tmp_path / "c++", []
    for version in ("9", "12"):
        compiler.write_text(f"#!/bin/sh\necho {version}\n")
        compiler.chmod(0o755)
        numbers += [origin(str(compiler)), origin(str(compiler))]
    monkeypatch.setenv("CXX", f"{compiler} -stdlib=libc++")
    numbers.append(origin(str(compiler)))
    assert numbers[0] == numbers[1] and numbers[2] == numbers[3]
    assert len(set(numbers)) == 3


def test_an_old_compiler_is_named(tmp_path: Path) -> None:
    """CMake asks a compiler for its version by the macros that it defines."""
    compiler, cmake = shutil.which("g++"), shutil.which("cmake")
    if compiler is None or cmake is None:
        pytest.skip("needs g++ and CMake")
    old = tmp_path / "g++"
    old.write_text(f'#!/bin/sh\nexec {compiler} -U__GNUC__ -D__GNUC__=10 "$@"\n')
    old.chmod(0o755)
    configured = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", f"-DCMAKE_CXX_COMPILER={old}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert configured.returncode != 0
    assert "mopo_fast needs g++ 11 or newer" in " ".join(configured.stderr.split())


def test_one_version() -> None:
    assert importlib.metadata.version("mopo_fast") == mopo_fast.__version__
    assert f"\nversion: {mopo_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f'version: "{mopo_fast.__version__}"' in (ROOT / "packaging" / "conda" / "recipe.yaml").read_text()
    assert f"## {mopo_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_line_loads_without_torch() -> None:
    check = "import sys, mopo_fast.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_cuda_loads_where_it_is_used() -> None:
    check = "import sys, mopo_fast.rollout; sys.exit('mopo_fast._cuda' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_every_source_is_in_the_build() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    for suffix in ("cpp", "cu"):
        for source in (ROOT / "csrc").rglob(f"*.{suffix}"):
            assert str(source.relative_to(ROOT)) in listed


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *(name for extra in extras.values() for name in extra)]
    wanted += project["build-system"]["requires"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {re.split(r"[<>=\[]", name)[0].lower() for name in wanted} <= pinned


def test_the_conda_recipe_has_every_requirement() -> None:
    other = {
        "torch": "pytorch",
        "matplotlib": "matplotlib-base",
        "mujoco": "mujoco-python",
        "xxhash": "python-xxhash",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    recipe = (ROOT / "packaging" / "conda" / "recipe.yaml").read_text()
    for requirement in project["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(>=[\d.]+)", requirement).groups()
        assert f"    - {other.get(name, name.replace('-', '_'))} {version}\n" in recipe


@pytest.mark.parametrize("isa", ["portable", *X86, *ARM])
def test_the_linker_cannot_mix_instruction_sets(isa: str) -> None:
    # The linker keeps one copy of an inline function that two files share, compiled for either instruction
    # set. An older processor could then meet instructions that it lacks, so these files may share none.
    # As tests/conftest.py says: with this variable, another architecture is tested.
    emulated = "MOPO_FAST_TEST_DRIVER" in os.environ
    objects = list((ROOT / "build").glob(f"{'arm' if emulated else 'cmake-release-*'}/**/{isa}.cpp.o"))
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    if isa in (X86 if emulated or platform.machine() in ("aarch64", "arm64") else ARM):
        pytest.skip("not of this architecture")
    assert objects, "the kernels were not built in this tree: make install, or make arm"
    for path in objects:
        symbols = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True)
        weak = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines() if line.split()[1] in "WVu"]
        assert not [name for name in weak if f"4mopo{len(isa)}{isa}" not in name]  # mangled mopo::isa


def test_a_test_run_says_which_instruction_sets_it_has_tested() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "turns"]
    done = subprocess.run(
        [*command, "tests/kernels/test_kernel_math.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("instruction sets")]
    ran, lacking = said.split("; not: ")
    assert re.findall(r"(\w+) \(\d tests\)", ran) == sorted(cpu.isas())
    assert sorted([*cpu.isas(), *lacking.split(", ")]) == sorted(["portable", *X86, *ARM])
