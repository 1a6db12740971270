"""Test that runs go to a stand-in of the Hugging Face Hub and come back, and that bad ones are refused."""

import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from small_hub import TOKEN, Hub, serving

from mopo_fast.cli import main
from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError
from mopo_fast.hub import pull, push
from mopo_fast.model_card import model_card
from mopo_fast.policy import Actor
from mopo_fast.run.folder import read_config

RECORDED = ROOT / "tests" / "recorded" / "version_0_1_0" / "finished"
REPO = "user/hopper"
MODELS = {"config.json", "policy.json", "policy.safetensors", "dynamics.json", "dynamics.safetensors"}
UPLOADED = MODELS | {"summary.json", "progress.csv", "fit.json", "README.md"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve an empty hub, with a user who is logged in."""
    package = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    with serving() as server:
        # As HF_ENDPOINT does, which is read when the package is imported.
        monkeypatch.setattr(package, "HfApi", functools.partial(package.HfApi, endpoint=server.endpoint))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        # Its server speaks a protocol of its own.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run that has recorded absolute paths, with files that nobody needs."""
    folder = tmp_path / "mine" / "run"
    shutil.copytree(RECORDED, folder)
    for name in ("config.json", "fit.json", "summary.json"):
        recorded = json.loads((folder / name).read_text())
        recorded["dataset"] = str(tmp_path / "hopper-random-local.hdf5")
        (folder / name).write_text(json.dumps(recorded))
    for name in (".lock", "report.html", "events.out.tfevents.1", "export/policy.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    return folder


def keep_policy(run: Path, updates: int) -> str:
    (run / "policies").mkdir(exist_ok=True)
    name = f"policies/policy-{updates:07}.safetensors"
    shutil.copy(run / "policy.safetensors", run / name)
    return name


def test_a_run_goes_to_the_hub_and_comes_back(hub: Hub, run: Path, tmp_path: Path) -> None:
    kept = keep_policy(run, 50)
    pushed = push(run, REPO)
    assert pushed.url.startswith(f"{hub.endpoint}/{REPO}/commit/")
    stored = hub.files(REPO)
    assert set(pushed.files) == stored.keys() - {".gitattributes"} == {*UPLOADED, kept}
    assert len(hub.repos[REPO]) == 2 and REPO not in hub.private
    for name, content in stored.items():
        assert os.fsencode(tmp_path) not in content, name
    pulled = pull(REPO)
    assert pulled == Path("runs", "hopper") and os.listdir("runs") == ["hopper"]
    assert {path.relative_to(pulled).as_posix() for path in pulled.rglob("*") if path.is_file()} == {
        *UPLOADED,
        kept,
    }
    assert not any(path.is_symlink() for path in pulled.rglob("*"))
    for name in ("policy.safetensors", "dynamics.safetensors", "progress.csv"):
        assert (pulled / name).read_bytes() == (run / name).read_bytes()
    assert read_config(pulled).dataset == "hopper-random-local.hdf5"
    assert read_config(pulled).sac == read_config(run).sac


def test_the_code_in_the_model_card_works(hub: Hub, run: Path) -> None:
    push(run, REPO)
    card = hub.files(REPO)["README.md"].decode()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["actions"].shape == (1, 3) and names["dynamics"].members == 3
    shutil.rmtree("runs")
    fetch, evaluate = re.findall(r"^mopo-fast (pull .*|evaluate .*)$", card, re.MULTILINE)
    assert main(fetch.split()) == 0
    assert main([*evaluate.split(), "--episodes", "1"]) == 0


def test_the_checkpoint_goes_on_request(hub: Hub, run: Path) -> None:
    push(run, REPO, checkpoint=True, private=True)
    name = "checkpoint/epoch-000008.safetensors"
    assert hub.files(REPO).keys() - {".gitattributes"} == {*UPLOADED, name}
    assert REPO in hub.private
    assert os.fsencode(run.parent) not in hub.files(REPO)[name]
    assert (pull(REPO) / name).read_bytes() == (run / name).read_bytes()
    shutil.rmtree(run / "checkpoint")
    with pytest.raises(InputError, match="has no checkpoint; leave out --checkpoint"):
        push(run, REPO, checkpoint=True)


def test_another_push_removes_what_the_run_has_no_more(hub: Hub, run: Path) -> None:
    kept = keep_policy(run, 50)
    push(run, REPO)
    hub.commit(REPO, {**hub.files(REPO), "notes.md": b"my notes"})
    (run / kept).unlink()
    later = keep_policy(run, 60)
    push(run, REPO)
    assert hub.files(REPO).keys() - {".gitattributes"} == {*UPLOADED, later, "notes.md"}


def test_a_refused_commit_changes_nothing(hub: Hub, run: Path) -> None:
    push(run, REPO)
    before = dict(hub.repos[REPO])
    (run / "progress.csv").write_text("epoch\n1\n")
    hub.refuse = 500
    with pytest.raises(InputError, match=r"the Hub refused user/hopper with status 500 \(.*disk is full"):
        push(run, REPO)
    assert hub.repos[REPO] == before


def test_an_older_commit_is_downloaded(hub: Hub, run: Path, tmp_path: Path) -> None:
    first = push(run, REPO).url.rpartition("/")[2]
    (run / "progress.csv").write_text("epoch\n1\n")
    push(run, REPO)
    assert len((pull(REPO, "old", revision=first) / "progress.csv").read_text()) > 100
    assert (pull(REPO, "new") / "progress.csv").read_text() == "epoch\n1\n"


@pytest.mark.parametrize("name", ["dynamics.safetensors", "fit.json"])
def test_an_interrupted_download_goes_on(hub: Hub, run: Path, name: str) -> None:
    push(run, REPO)
    hub.cut = name
    with pytest.raises(InputError, match=r"the Hub did not answer .* give the same command again"):
        pull(REPO)
    assert not Path("runs").exists()
    before = {asked for asked in hub.asked if asked.startswith("GET") and "resolve" in asked}
    hub.cut = ""
    hub.asked.clear()
    assert (pull(REPO) / name).read_bytes() == hub.files(REPO)[name]
    # A file that is there already is not fetched again.
    again = {asked for asked in hub.asked if asked.startswith("GET") and "resolve" in asked}
    assert before and not {asked for asked in before & again if not asked.endswith(name)}


def other_sizes(files: dict[str, bytes]) -> None:
    Actor(5, 2, hidden=(4,)).save("other")
    for suffix in ("json", "safetensors"):
        files[f"policy.{suffix}"] = Path(f"other/policy.{suffix}").read_bytes()


def replace(name: str, content: bytes | None) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files.pop(name, None)
        if content is not None:
            files[name] = content

    return change


def setting(name: str, value: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | {name: value}).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("dynamics.json", None), r"user/hopper holds no run of mopo_fast: it lacks dynamics\.json"),
        (replace("config.json", b"{}"), r"no sound run of mopo_fast: config\.json has no settings of a tr"),
        (replace("config.json", b"import os"), r"no sound run of mopo_fast: config\.json is not a readable"),
        (setting("steps", "many"), r"no sound run of mopo_fast: config\.json: steps: Input should be"),
        (replace("policy.safetensors", b"\x80\x04."), r"policy\.safetensors is not a whole safetensors file"),
        (replace("summary.json", b'{"score_mean": 1}'), r"no sound run of mopo_fast: summary\.json: "),
        (replace("fit.json", b"[]"), r"no sound run of mopo_fast: fit\.json: "),
        (replace("progress.csv", b"a,b\n1\n"), r"no sound run of mopo_fast: progress\.csv has a row"),
        (replace("policies/policy-0000001.safetensors", b"x"), r"policy-0000001\.safetensors is not a whole"),
        (other_sizes, r"policy\.json has sizes 5 and 2, dynamics\.json 11 and 3"),
        (replace("../../evil.json", b"{}"), r"has a file '\.\./\.\./evil\.json', which no run has"),
        (replace("/etc/evil.json", b"{}"), "has a file '/etc/evil.json', which no run has"),
        (replace("a\x1b[2J", b"{}"), r"has a file 'a\\\\x1b\[2J', which no run has"),
    ],
)
def test_a_repository_without_a_sound_run_is_refused(
    hub: Hub, run: Path, change: Callable[[dict[str, bytes]], None], message: str
) -> None:
    push(run, REPO)
    files = dict(hub.files(REPO))
    change(files)
    hub.commit(REPO, files)
    with pytest.raises(InputError, match=message) as refused:
        pull(REPO)
    assert not Path("runs").exists() and ".new-" not in str(refused.value)


def test_other_files_are_left_out_and_named(hub: Hub, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    push(run, REPO)
    hub.commit(REPO, {**hub.files(REPO), "model.pkl": b"x", "checkpoint/evil.py": b"x", "policies/x": b"y"})
    with caplog.at_level(logging.INFO, "mopo_fast"):
        pulled = pull(REPO)
    assert caplog.messages == [f"not downloaded from {REPO}: checkpoint/evil.py, model.pkl, policies/x"]
    assert not list(pulled.rglob("*.p*[yl]")) and not (pulled / "policies").exists()
    assert not any("evil" in asked for asked in hub.asked if "resolve" in asked)


def test_a_link_in_the_cache_that_leads_out_is_refused(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, REPO)
    shutil.rmtree(pull(REPO, "first"))
    (cached,) = (tmp_path / "cache").rglob("snapshots/*/progress.csv")
    (tmp_path / "secret").write_text("secret\n1\n")
    cached.unlink()
    cached.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"progress.csv leads out of the cache; remove"):
        pull(REPO)
    assert not Path("runs").exists()


def test_a_folder_that_exists_is_not_touched(hub: Hub, run: Path) -> None:
    push(run, REPO)
    Path("runs/hopper").mkdir(parents=True)
    hub.asked.clear()
    with pytest.raises(InputError, match="runs/hopper exists already; choose another --out"):
        pull(REPO)
    assert main(["pull", REPO, "--out", "runs"]) == 2
    assert not hub.asked


def test_what_the_hub_says_is_told_in_one_sentence(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run, REPO, private=True)
    with pytest.raises(InputError, match="the name of a repository is USER/NAME, got 'hopper'"):
        pull("hopper")
    with pytest.raises(InputError, match=r"the name of a repository is USER/NAME, got 'user/-\.\.-'"):
        push(run, "user/-..-")
    with pytest.raises(InputError, match=r"user/hopper has no revision 'v9'; check the name"):
        pull(REPO, revision="v9")
    with pytest.raises(InputError, match=r"refused other/hopper with status 403 \(.*rights.*another name"):
        push(run, "other/hopper")
    hub.refuse = 401
    with pytest.raises(InputError, match=r"refused user/hopper with status 401 \(.*`hf auth login`"):
        push(run, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"no repository user/hopper, or it is private; .*`hf auth login`"):
        pull(REPO)
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    with pytest.raises(
        InputError, match="no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"
    ):
        push(run, REPO)
    assert not hub.asked


def test_a_hub_that_does_not_answer(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    # Nothing listens at this port.
    api = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    for ask in (lambda: push(run, REPO), lambda: pull(REPO)):
        with pytest.raises(InputError, match=r"the Hub did not answer \(.*refused\); check the network"):
            ask()


def test_a_cache_that_cannot_be_written_is_named(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    push(run, REPO)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be read or written \(Not a directory\); .*set HF_HOME"):
        pull(REPO)


def test_a_run_that_cannot_be_uploaded_is_refused_before_the_hub_is_asked(
    hub: Hub, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not a run folder"):
        push(tmp_path / "nothing", REPO)
    fit = tmp_path / "fit"
    fit.mkdir()
    (fit / "config.json").write_text('{"dataset": "hopper-random-local", "seed": 0}')
    with pytest.raises(InputError, match="holds a fit without a training; give the folder of a run"):
        push(fit, REPO)
    secret = run / "progress.csv"
    secret.unlink()
    secret.symlink_to("/etc/hostname")
    with pytest.raises(InputError, match=r"progress.csv is a symbolic link or no file"):
        push(run, REPO)
    secret.unlink()
    (run / "policy.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"policy.safetensors is not a whole safetensors file"):
        push(run, REPO)
    (run / "policy.json").unlink()
    with pytest.raises(InputError, match="has no policy yet"):
        push(run, REPO)
    assert not hub.asked


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for ask in (lambda: push(run, REPO), lambda: pull(REPO, tmp_path / "out")):
        with pytest.raises(InputError, match=r"huggingface_hub .*`pip install '\.\[hub\]'` in the checkout"):
            ask()


def card_of(run: Path, **changes: Any) -> str:
    pytest.importorskip("huggingface_hub")
    recorded = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(recorded | changes))
    return model_card(run, REPO)


def test_the_card_tells_the_score_and_how_it_was_measured(run: Path) -> None:
    card = card_of(run)
    assert "| normalised score | 1.03 ± 0.01 |" in card and "| return | 13.30 ± 0.17 |" in card
    assert "over 2 episodes in MuJoCo (`Hopper-v" in card and "after 75 updates, its mean acting" in card
    assert "one training, with seed 3" in card and "| torch | `2.13.0+cpu` |" in card
    assert "value: 1.03 +/- 0.01" in card and "library_name: mopo_fast" in card


def test_the_card_of_a_run_without_a_score_in_an_environment(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"scored_by": "model", "score_mean": None}))
    card = card_of(run, task="cart.py")
    assert "**not in an environment**" in card and "normalised" not in card and "model-index" not in card
    assert "mopo-fast evaluate runs/hopper --task cart.py" in card and "which is not in this rep" in card
    (run / "summary.json").unlink()
    card = card_of(run)
    assert "The training is not finished, so there is no score yet." in card and "## Versions" not in card


def test_names_in_a_card_cannot_end_their_block(run: Path) -> None:
    card = card_of(run, dataset="x`|](http://evil)\n```\n# Title <script>", task="hopper`; rm -rf .py")
    fences = [line for line in card.splitlines() if line.startswith("```")]
    assert len(fences) == 6 and fences[1::2] == ["```"] * 3
    text = re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "`x-http://evil-Title-script-`" in text
    assert not re.search(r"<script>|^# Title|\]\(http://evil|; rm", text, re.MULTILINE)


def test_a_member_of_the_ensemble_is_named_by_its_number(run: Path) -> None:
    ensemble = EnsembleDynamics.load(run)
    ensemble.elites.copy_(torch.tensor([2, 0]))
    ensemble.save(run)
    assert "3 members, elites [2, 0]" in card_of(run)
