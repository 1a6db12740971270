"""Film episodes of a policy with MuJoCo's offscreen renderer."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v2 as imageio
import numpy as np

from mopo_fast.environments import make_environment
from mopo_fast.errors import InputError
from mopo_fast.evaluate import episode_seed
from mopo_fast.tasks import Task
from mopo_fast.utils.atomic import atomic_path, check_writable
from mopo_fast.utils.machine import gl_library
from mopo_fast.utils.progress import print_lines, progress_bar

# Most pictures per second. A GIF's browsers slow down above it, and an eye sees no more.
_MOST_FPS = 50
# Width and height of the map of shadows. MuJoCo's 4096 takes most of the time where the CPU renders.
_SHADOWS = 1024


class Film:
    """A video of an evaluation's first episodes, one after the other at the speed of the environment.

    `evaluate` reports the actions of its episodes by `add_actions`. `write` repeats the episodes with these
    actions and renders them, so that no pictures are kept in memory.

    Args:
        path: file to write, .mp4 or .gif.
        task: task of the evaluation.
        seed: seed of the evaluation.
        episodes: number of episodes to film.
        steps: most steps of an episode to film, or None for whole episodes.

    Raises:
        InputError: the file cannot be written, no encoder for it is installed, or the environment cannot be
            rendered on this machine. All of this is tried at once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        task: Task,
        *,
        seed: int,
        episodes: int = 1,
        steps: int | None = None,
    ) -> None:
        self.path, self.task, self.seed = Path(path), task, seed
        if episodes < 1:
            raise InputError(f"a video needs at least 1 episode, got {episodes}")
        if steps is not None and steps < 1:
            raise InputError(f"a video needs at least 1 step, got {steps}")
        self.episodes, self.steps = episodes, steps
        _check_encoder(self.path)
        check_writable(self.path)
        with _rendered(task) as environment:
            environment.reset(seed=0)
            _render(environment, task)
        self._actions: list[np.ndarray[Any, Any]] = []

    def add_actions(self, actions: np.ndarray[Any, Any]) -> None:
        """Add the actions [episodes, act_dim] of one step of all episodes."""
        if self.steps is None or len(self._actions) < self.steps:
            self._actions.append(actions[: self.episodes].copy())

    def write(self, *, quiet: bool = False) -> None:
        """Render the episodes and write the file, whole or not at all.

        Args:
            quiet: show no progress.

        Raises:
            InputError: the file cannot be written.
            KeyboardInterrupt: Ctrl-C was pressed. It says that no video was written.
        """
        episodes = min(self.episodes, len(self._actions[0]))
        if not quiet:
            print_lines(
                f"filming {episodes} episode{'s' * (episodes > 1)} of at most {len(self._actions):,} steps"
            )
        try:
            self._write(episodes, quiet)
        except KeyboardInterrupt:
            left = "the earlier file is left as it was" if self.path.exists() else "no file is left"
            raise KeyboardInterrupt(
                f"stopped; {self.path} was not written and {left}. --video-steps makes a shorter video"
            ) from None

    def _write(self, episodes: int, quiet: bool) -> None:
        longest = episodes * len(self._actions)
        with (
            _rendered(self.task) as environment,
            atomic_path(self.path) as temporary,
            progress_bar("video", longest, unit="step", quiet=quiet) as bar,
        ):
            fps = float(environment.metadata.get("render_fps") or 30)
            # Fast simulations take some steps per picture.
            stride = math.ceil(fps / _MOST_FPS)
            with _writer(temporary, self.path.suffix, fps / stride) as append:
                for episode in range(episodes):
                    environment.reset(seed=episode_seed(self.seed, episode))
                    append(_render(environment, self.task))
                    for step, actions in enumerate(self._actions, start=1):
                        _, _, terminated, truncated, _ = environment.step(actions[episode])
                        ended = terminated or truncated
                        if ended or step % stride == 0:
                            append(_render(environment, self.task))
                        bar.advance()
                        if ended:
                            longest -= len(self._actions) - step
                            bar.update(total=longest)
                            break


def _check_encoder(path: Path) -> None:
    if path.suffix not in (".mp4", ".gif"):
        raise InputError(f"a video's name must end in .mp4 or .gif, got {path}")
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise InputError(
            f"{path} needs an MP4 encoder; install one with `pip install '.[video]'` in the checkout, or give"
            " a .gif"
        )


@contextlib.contextmanager
def _rendered(task: Task) -> Iterator[Any]:
    """Yield the task's environment, ready to be rendered without a window."""
    if not task.env_id:
        raise InputError(f"the task {task.name} has no environment, so there is nothing to film")
    os.environ["MUJOCO_GL"] = gl_library()
    try:
        environment = make_environment(task.env_id, render_mode="rgb_array")
    except (gymnasium.error.Error, ImportError, TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"the environment {task.env_id} cannot be rendered ({_first_line(error)})"
        ) from error
    model: Any = getattr(environment.unwrapped, "model", None)
    if hasattr(model, "vis"):
        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, _SHADOWS)
    try:
        yield environment
    finally:
        # A renderer that failed to start also fails to close.
        with contextlib.suppress(Exception):
            environment.close()


def _render(environment: Any, task: Task) -> np.ndarray[Any, Any]:
    try:
        frame = environment.render()
    # Each OpenGL library raises errors of its own.
    except Exception as error:
        raise InputError(
            f"{task.env_id} cannot be rendered, because OpenGL does not start with MUJOCO_GL={gl_library()}"
            f" ({_first_line(error)}); install libegl1 or libosmesa6, and set MUJOCO_GL to egl or osmesa"
        ) from error
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        raise InputError(f"the environment {task.env_id} cannot be rendered: render() gives no picture")
    return frame


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")


@contextlib.contextmanager
def _writer(path: Path, suffix: str, fps: float) -> Iterator[Callable[[np.ndarray[Any, Any]], None]]:
    """Yield a function that appends a picture to a video in the format of `suffix`."""
    # The temporary file's name does not tell the format, neither to imageio nor to ffmpeg.
    if suffix == ".mp4":
        options: dict[str, Any] = {"fps": fps, "quality": 8, "output_params": ["-f", "mp4"]}
    else:
        options = {"duration": 1000.0 / fps, "loop": 0}
    writer = imageio.get_writer(str(path), format=suffix, mode="I", **options)
    try:
        yield writer.append_data
    finally:
        writer.close()
