"""Test videos of episodes, in an environment whose pictures need no OpenGL."""

import importlib.util
import re
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from mopo_fast.errors import InputError
from mopo_fast.evaluate import evaluate
from mopo_fast.policy import Actor
from mopo_fast.tasks import Task, make_box
from mopo_fast.video import Film


class Walk(gymnasium.Env[Any, Any]):
    """A walk on a line that ends right of 0.5; its picture is as bright as it is far."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 125}

    def __init__(self, render_mode: str | None = None, broken: bool = False) -> None:
        self.render_mode, self.broken = render_mode, broken
        self.observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float64)
        self.action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(0.0, 0.1, 2)
        return self.state.copy(), {}

    def step(self, action: Any) -> Any:
        self.state = self.state + 0.01 * (1.0 + 0.1 * action[0])
        return self.state.copy(), 1.0, bool(self.state[0] > 0.5), False, {}

    def render(self) -> Any:
        if self.broken:
            raise RuntimeError("no GL\nmore")
        return np.full((32, 48, 3), min(255, int(255 * self.state[0])), np.uint8)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in (("Walk", {}), ("Dark", {"broken": True})):
        spec = gymnasium.envs.registration.EnvSpec(f"{name}-v0", Walk, kwargs=options)
        monkeypatch.setitem(gymnasium.registry, f"{name}-v0", spec)


def task(env_id: str = "Walk-v0") -> Task:
    return Task("walk", env_id, 2, 1, make_box(2))


def actor() -> Actor:
    torch.manual_seed(0)
    return Actor(2, 1, hidden=(8,))


def film(path: Path, **options: int) -> tuple[int, ...]:
    """Film an evaluation of three episodes, and return their lengths."""
    one = Film(path, task(), seed=4, **options)
    result = evaluate(actor(), task(), episodes=3, seed=4, on_actions=one.add_actions)
    one.write(quiet=True)
    return result.lengths


def test_a_gif_has_the_evaluated_episodes(tmp_path: Path) -> None:
    lengths = film(tmp_path / "a" / "walk.gif", episodes=2)
    frames = imageio.imread(tmp_path / "a" / "walk.gif", index=None)
    # One picture in three steps, one of the first state and one of the last.
    assert len(frames) == sum(1 + -(-length // 3) for length in lengths[:2])
    assert frames.shape[1:3] == (32, 48)
    brightness = frames.reshape(len(frames), -1).mean(1)
    falls = np.flatnonzero(np.diff(brightness) < 0)
    assert len(falls) == 1 and brightness[falls[0]] > 120
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "walk.gif"]


def test_a_film_of_the_first_steps(tmp_path: Path) -> None:
    lengths = film(tmp_path / "walk.gif", episodes=2, steps=12)
    assert min(lengths) > 12
    frames = imageio.imread(tmp_path / "walk.gif", index=None)
    assert len(frames) == 2 * (1 + 12 // 3)
    with pytest.raises(InputError, match="at least 1 step, got 0"):
        Film(tmp_path / "walk.gif", task(), seed=4, steps=0)


def test_filming_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Film(tmp_path / "walk.gif", task(), seed=4, episodes=3)
    lengths = evaluate(actor(), task(), episodes=3, seed=4, on_actions=one.add_actions).lengths
    one.write()
    first, last = capsys.readouterr().err.splitlines()
    assert first == f"filming 3 episodes of at most {max(lengths)} steps"
    # Episodes that end before the longest one are whole all the same.
    whole = sum(lengths)
    assert whole < 3 * max(lengths) and last.startswith(f"video: {whole}/{whole} steps, ")


def test_a_film_has_no_more_episodes_than_the_evaluation(tmp_path: Path) -> None:
    film(tmp_path / "walk.gif", episodes=9)
    assert len(imageio.imread(tmp_path / "walk.gif", index=None)) > 30


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="needs the extra `video`")
def test_an_mp4(tmp_path: Path) -> None:
    film(tmp_path / "walk.mp4")
    assert (tmp_path / "walk.mp4").read_bytes()[4:8] == b"ftyp"
    assert len(imageio.imread(tmp_path / "walk.mp4", index=None, plugin="FFMPEG")) > 10


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "walk.gif"
    path.write_bytes(b"old")
    one = Film(path, task(), seed=4)
    evaluate(actor(), task(), episodes=1, seed=4, on_actions=one.add_actions)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Walk, "step", stop)
    with pytest.raises(KeyboardInterrupt, match="not written and the earlier file is left"):
        one.write(quiet=True)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "env_id", "message"),
    [
        ("a.avi", "Walk-v0", r"must end in .mp4 or .gif, got .*a\.avi"),
        ("a.gif", "Dark-v0", r"Dark-v0 cannot be rendered, because OpenGL .* \(no GL\); install"),
        ("a.gif", "", "has no environment"),
        ("a.gif", "Absent-v0", "Absent-v0 cannot be rendered"),
    ],
)
def test_what_cannot_be_filmed_is_one_sentence(tmp_path: Path, name: str, env_id: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Film(tmp_path / name, task(env_id), seed=0)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopo_fast.video.importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=re.escape("`pip install '.[video]'` in the checkout, or give a .gif")
    ):
        Film(tmp_path / "a.mp4", task(), seed=0)
