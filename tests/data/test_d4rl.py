"""Test D4RL's names, and downloads from a local server that can fail as real ones do."""

import hashlib
import http.server
import io
import multiprocessing
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from mopo_fast.config import Compat
from mopo_fast.data import d4rl, load_dataset
from mopo_fast.errors import InputError


def hdf5_bytes(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["observations"] = np.random.default_rng(seed).normal(size=(4000, 11)).astype(np.float32)
        file["actions"] = np.zeros((4000, 3), np.float32)
        file["rewards"] = np.zeros(4000, np.float32)
        file["terminals"] = np.zeros(4000, bool)
        file["timeouts"] = np.zeros(4000, bool)
    return buffer.getvalue()


CONTENT = hdf5_bytes()


class Server(http.server.ThreadingHTTPServer):
    """HTTP server that serves `content` at every path.

    Attributes:
        ranges: True to support Range requests.
        most: number of bytes after which a connection breaks, or None.
        length: True to send Content-Length.
        shift: bytes by which an answer misses the start of the requested range.
        status: HTTP error to send instead of the file, or None.
        requests: (path, Range header) of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.most: int | None = None
        self.length = True
        self.shift = 0
        self.status: int | None = None
        self.requests: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, span = self.server, self.headers.get("Range")
        server.requests.append((self.path, span))
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span and server.ranges else 0
        size = len(server.content)
        if server.status is not None:
            self.send_error(server.status)
            return
        if start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.end_headers()
            return
        self.send_response(206 if span and server.ranges else 200)
        if span and server.ranges:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{size - 1}/{size}")
        if server.length:
            self.send_header("Content-Length", str(size - start))
        self.end_headers()
        end = size if server.most is None else min(size, start + server.most)
        self.wfile.write(server.content[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(d4rl, "BASE_URL", server.address)
    monkeypatch.setattr(d4rl, "TIMEOUT_S", 5.0)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("halfcheetah-medium-replay-v2", "gym_mujoco_v2/halfcheetah_medium_replay-v2.hdf5"),
        ("walker2d-full-replay-v1", "gym_mujoco_v1/walker2d_full_replay-v1.hdf5"),
        ("ant-medium-expert-v2", "gym_mujoco_v2/ant_medium_expert-v2.hdf5"),
        ("hopper-random-v0", "gym_mujoco/hopper_random.hdf5"),
        ("hopper-mixed-v0", "gym_mujoco/hopper_mixed.hdf5"),
        ("halfcheetah-medium-replay-v0", "gym_mujoco/halfcheetah_mixed.hdf5"),
        ("walker2d-mixed-v0", "gym_mujoco/walker_mixed.hdf5"),
        ("walker2d-medium-v0", "gym_mujoco/walker2d_medium.hdf5"),
        ("ant-mixed-v0", "gym_mujoco/ant_mixed.hdf5"),
        ("ant-random-expert-v0", "gym_mujoco/ant_random_expert.hdf5"),
    ],
)
def test_names(name: str, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert d4rl.url(name) == f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{location}"
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    assert d4rl.cache_path(name) == Path("/home/someone/.d4rl/datasets") / Path(location).name
    monkeypatch.setenv("D4RL_DATASET_DIR", "/elsewhere")
    assert d4rl.cache_path(name) == Path("/elsewhere") / Path(location).name


def test_how_many_there_are() -> None:
    # 4 tasks: v1 and v2 have 6 tiers each; v0 has 5 and an older name of medium-replay. Ant also has
    # random-expert.
    assert len(d4rl.LOCATIONS) == 48 + 24 + 1
    assert "hopper-full-replay-v0" not in d4rl.LOCATIONS


def test_download_then_cache(server: Server, tmp_path: Path) -> None:
    data = load_dataset("hopper-medium-v2", quiet=True)
    assert (data.name, len(data), data.obs_dim) == ("hopper-medium-v2", 3999, 11)
    path = tmp_path / "cache" / "hopper_medium-v2.hdf5"
    assert data.info["path"] == str(path)
    assert path.read_bytes() == CONTENT
    record = path.with_name(f"{path.name}.sha256")
    assert sorted(path.parent.iterdir()) == [path, record]
    assert record.read_text() == f"{hashlib.sha256(CONTENT).hexdigest()}  {path.name}\n"
    load_dataset("hopper-medium-v2", quiet=True)
    assert server.requests == [("/gym_mujoco_v2/hopper_medium-v2.hdf5", None)]


def test_another_file_than_the_first_time(server: Server, tmp_path: Path) -> None:
    path, record = tmp_path / "a.hdf5", tmp_path / "a.hdf5.sha256"
    d4rl.download(server.address, path, quiet=True)
    path.unlink()
    # The same file may be downloaded again, even in parts.
    server.most = 60_000
    d4rl.download(server.address, path, quiet=True)
    path.unlink()
    server.most, server.content = None, hdf5_bytes(seed=1)
    with pytest.raises(
        d4rl.HostError, match=r"sent a file with SHA-256 \w{64}, .* had \w{64}; .*remove .*a\.hdf5\.sha256"
    ):
        d4rl.download(server.address, path, quiet=True)
    assert not path.exists()
    record.write_text("")
    with pytest.raises(InputError, match=r"a\.hdf5\.sha256 is not a whole SHA-256 file"):
        d4rl.download(server.address, path, quiet=True)
    record.unlink()
    d4rl.download(server.address, path, quiet=True)
    assert path.read_bytes() == server.content
    assert record.read_text().split() == [hashlib.sha256(server.content).hexdigest(), "a.hdf5"]


def test_a_file_that_reaches_elsewhere_is_refused(server: Server, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["observations"] = h5py.ExternalLink("/etc/passwd", "/")
    server.content = buffer.getvalue()
    with pytest.raises(d4rl.HostError, match=r"did not send a sound file \(.*observations is a link"):
        d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.hdf5.part"]
    assert (tmp_path / "a.hdf5.part").stat().st_size == 0


def test_broken_connections_are_continued(server: Server, tmp_path: Path) -> None:
    server.most = 60_000
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT
    spans = [span for _, span in server.requests]
    assert spans == [None, *(f"bytes={start}-" for start in range(60_000, len(CONTENT), 60_000))]


def test_next_call_goes_on(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.hdf5.part").write_bytes(CONTENT[:1000])
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT
    assert server.requests == [("/", "bytes=1000-")]
    assert not (tmp_path / "a.hdf5.part").exists()


def test_whole_part_is_only_renamed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.hdf5.part").write_bytes(CONTENT)
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT


def test_part_of_a_longer_file_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.hdf5.part").write_bytes(CONTENT + b"more")
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT


def test_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "a.hdf5.part").write_bytes(b"x" * 1000)
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT


def test_truncating_server_without_ranges_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges, server.most = False, 1000
    with pytest.raises(d4rl.HostError, match=f"sent 1000 of {len(CONTENT)} bytes"):
        d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert len(server.requests) == 2
    assert not (tmp_path / "a.hdf5").exists()


def test_server_that_tells_no_length(server: Server, tmp_path: Path) -> None:
    server.length = False
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT
    server.most = 50_000
    with pytest.raises(d4rl.HostError, match="not a whole HDF5 file"):
        d4rl.download(server.address, tmp_path / "b.hdf5", quiet=True)
    assert not (tmp_path / "b.hdf5").exists()


def test_what_is_not_hdf5_is_refused_and_forgotten(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>please log in</html>"
    with pytest.raises(d4rl.HostError, match="not a whole HDF5 file"):
        d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    server.content = CONTENT
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT


def test_another_part_than_asked_for(server: Server, tmp_path: Path) -> None:
    server.shift = -1
    (tmp_path / "a.hdf5.part").write_bytes(CONTENT[:1000])
    with pytest.raises(d4rl.HostError, match="sent another part of the file"):
        d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5.part").read_bytes() == CONTENT[:1000]


def test_error_status(server: Server) -> None:
    server.status = 404
    with pytest.raises(d4rl.HostError, match="answered 404 Not Found"):
        load_dataset("hopper-medium-v2", quiet=True)


def test_unreachable_host_tells_the_ways_out(server: Server, tmp_path: Path) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError) as caught:
        load_dataset("walker2d-random-v2", quiet=True)
    message = str(caught.value)
    assert "cannot be reached (" in message and "refused" in message
    assert f"{server.address}gym_mujoco_v2/walker2d_random-v2.hdf5" in message
    assert str(tmp_path / "cache" / "walker2d_random-v2.hdf5") in message
    assert "mopo-fast collect" in message


def test_file_put_there_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(d4rl, "BASE_URL", "http://127.0.0.1:1/")
    (tmp_path / "walker_mixed.hdf5").write_bytes(CONTENT)
    assert load_dataset("walker2d-mixed-v0", quiet=True).name == "walker2d-mixed-v0"


@pytest.mark.parametrize(
    ("forces", "compat", "kept"), [(0.0, None, 27), (0.0, "d4rl", 111), (0.5, None, 111)]
)
def test_ants_empty_contact_forces_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forces: float, compat: Compat | None, kept: int
) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    observations = np.random.default_rng(0).normal(size=(9, 111)).astype(np.float32)
    observations[:, 27:] = 0.0
    observations[7, 110] = forces
    with h5py.File(tmp_path / "ant_random-v2.hdf5", "w") as file:
        file["observations"] = observations
        file["actions"] = np.zeros((9, 8), np.float32)
        file["rewards"] = np.zeros(9, np.float32)
        file["terminals"] = np.zeros(9, bool)
        file["timeouts"] = np.zeros(9, bool)
    data = load_dataset("ant-random-v2", compat=compat)
    assert data.obs_dim == kept and data.next_observations.shape == data.observations.shape
    np.testing.assert_array_equal(data.observations, observations[: len(data), :kept])


def test_folder_that_cannot_be_written(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", "/dev/null/cache")
    with pytest.raises(InputError, match=r"cannot write /dev/null/cache.*choose another folder") as caught:
        load_dataset("hopper-medium-v2", quiet=True)
    assert not isinstance(caught.value, d4rl.HostError)
    assert server.requests == []


def test_full_disk(server: Server, tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*a\.hdf5\.part: File too large; free space"):
            d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not (tmp_path / "a.hdf5").exists()
    # Once there is space, the next call continues.
    d4rl.download(server.address, tmp_path / "a.hdf5", quiet=True)
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT


def test_processes_share_one_download(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (server.address, tmp_path / "a.hdf5")
    processes = [
        context.Process(target=d4rl.download, args=arguments, kwargs={"quiet": True}) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "a.hdf5").read_bytes() == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize(("rows", "warns"), [(402, False), (401, True)])
@pytest.mark.parametrize("named", [True, False])
def test_known_numbers_of_rows(
    rows: int,
    warns: bool,
    named: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Rows after the last end of an episode do not count, as in the published numbers."""
    monkeypatch.setitem(d4rl.COMPLETE_ROWS, "hopper-medium-replay-v2", 402)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = tmp_path / "hopper_medium_replay-v2.hdf5"
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((450, 11), np.float32)
        file["actions"] = np.zeros((450, 3), np.float32)
        file["rewards"] = np.zeros(450, np.float32)
        file["terminals"] = np.arange(450) == 200
        file["timeouts"] = np.arange(450) == rows - 1
    load_dataset("hopper-medium-replay-v2" if named else path)
    expected = (
        f"{path} has 401 rows in complete episodes, D4RL's hopper-medium-replay-v2 has 402; it is damaged"
    )
    assert [text.startswith(expected) for text in caplog.messages] == [True] * warns
    caplog.clear()
    # Under another name it may be anything.
    load_dataset(path.rename(tmp_path / "mine.hdf5"))
    assert not caplog.messages


def test_the_known_numbers_are_of_d4rls_sets() -> None:
    assert set(d4rl.COMPLETE_ROWS) <= set(d4rl.LOCATIONS)
