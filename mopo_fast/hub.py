"""Upload runs to the Hugging Face Hub and download them, with huggingface_hub.

A downloaded run is checked before its folder gets its name: another person's files are read with suspicion,
and nothing is unpickled.
"""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path, PurePosixPath
from typing import Any

from mopo_fast.ensemble import EnsembleDynamics
from mopo_fast.errors import InputError, printable
from mopo_fast.fit import read_fit
from mopo_fast.model_card import model_card
from mopo_fast.policy import Actor
from mopo_fast.run.find import check_policy, check_run
from mopo_fast.run.folder import holds_run, read_config, read_summary
from mopo_fast.run.kept import kept_policies
from mopo_fast.run.log import read_rows
from mopo_fast.utils.atomic import (
    missing_folders,
    read_json,
    refuse_links,
    regular_file,
    remove_empty,
    replace_folder,
    scratch_folder,
    write_json,
)
from mopo_fast.utils.progress import console

logger = logging.getLogger("mopo_fast")

_NEEDED = (
    *("config.json", "policy.json", "policy.safetensors", "dynamics.json", "dynamics.safetensors"),
)  # fmt: skip
_OPTIONAL = ("summary.json", "progress.csv", "fit.json", "fit.csv")
_NUMBERED = re.compile(r"policies/policy-\d{7,}\.safetensors|checkpoint/epoch-\d{6,}\.safetensors")
_REPO = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
_CHECKPOINT = "checkpoint/"
_CARD = "README.md"
_ANSWERS = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token",
    403: "take a token that may do this (HF_TOKEN), or another name",
    429: "wait, and give the same command again",
}
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Pushed:
    """A run that was uploaded.

    Attributes:
        url: page of the commit.
        files: names of the files that the commit has.
    """

    url: str
    files: tuple[str, ...]


def push(
    run: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    checkpoint: bool = False,
    quiet: bool = False,
) -> Pushed:
    """Upload a run to a repository of models on the Hub, in one commit.

    The files are config.json, the policy, the dynamics, summary.json, progress.csv, fit.json, fit.csv, kept
    policies, and a model card, README.md. In JSON, absolute paths are replaced by names of files. Files of a
    run that the repository has from an earlier upload and that this one lacks are removed.

    Args:
        run: folder of the run.
        repo: name of the repository, USER/NAME. It is made if it does not exist.
        private: make a new repository private.
        checkpoint: upload the checkpoint too, with which the training goes on.
        quiet: show no progress bars.

    Raises:
        InputError: the folder holds no run with a policy, a file is damaged or a link, huggingface_hub or a
            token is missing, or the Hub refuses or cannot be reached.
    """
    hub = _package()
    _check_name(repo)
    run = Path(run)
    check_run(run)
    if not holds_run(run):
        raise InputError(f"{run} holds a fit without a training; give the folder of a run")
    check_policy(run)
    with tempfile.TemporaryDirectory() as scratch:
        sources = _stage(run, checkpoint, Path(scratch))
        _check(Path(scratch))
        sources[_CARD] = Path(scratch, _CARD)
        sources[_CARD].write_text(model_card(Path(scratch), repo))
        with _asking(hub, repo, quiet):
            if hub.get_token() is None:
                raise InputError(f"there is no token for the Hub; {_LOG_IN}")
            api = hub.HfApi()
            # None leaves the choice to the settings of an organisation.
            api.create_repo(repo, private=private or None, exist_ok=True)
            there = {sibling.rfilename for sibling in api.model_info(repo).siblings or ()}
            removed = {name for name in there - sources.keys() if _is_of_run(name)}
            commit = api.create_commit(
                repo,
                [
                    *(hub.CommitOperationAdd(name, str(path)) for name, path in sources.items()),
                    *(hub.CommitOperationDelete(name) for name in sorted(removed)),
                ],
                commit_message="Upload a run of mopo_fast",
            )
    return Pushed(commit.commit_url, tuple(sources))


def pull(
    repo: str,
    out: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    quiet: bool = False,
) -> Path:
    """Download a run that `push` has uploaded, check it, and return its folder.

    The files go to the cache of huggingface_hub first, so that an interrupted download goes on when it is
    repeated. The folder appears when all files are there and sound.

    Args:
        repo: name of the repository, USER/NAME.
        out: folder for the run, which must not exist; None is NAME in `runs`.
        revision: branch, tag or commit; None is the latest commit of the main branch.
        quiet: show no progress bars.

    Raises:
        InputError: the folder exists, huggingface_hub is missing, the Hub has no such repository or cannot be
            reached, the repository holds no run, or a file of it is damaged.
    """
    hub = _package()
    _check_name(repo)
    out = Path("runs", repo.rpartition("/")[2]) if out is None else Path(out)
    if os.path.lexists(out):
        raise InputError(f"{out} exists already; choose another --out")
    with _asking(hub, repo, quiet, revision):
        api = hub.HfApi()
        info = api.model_info(repo, revision=revision)
        names = sorted(sibling.rfilename for sibling in info.siblings or ())
        files = _choose(repo, names)
        cache = Path(api.snapshot_download(repo, revision=info.sha, allow_patterns=files))
    made = missing_folders(out.parent)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(out.parent) as scratch:
            for name in files:
                _copy_cached(cache, name, scratch / "run" / name)
            try:
                _check(scratch / "run")
            except InputError as error:
                # The message names the scratch folder, which nobody will find.
                message = str(error).replace(f"{scratch / 'run'}{os.sep}", "")
                raise InputError(f"{repo} holds no sound run of mopo_fast: {message}") from None
            if os.path.lexists(out):
                raise InputError(f"{out} exists already; choose another --out")
            replace_folder(scratch, "run", out)
    except OSError as error:
        raise InputError(
            f"cannot write {out}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        remove_empty(made)
    return out


def _check_name(repo: str) -> None:
    if not _REPO.fullmatch(repo):
        raise _wrong_name(repo)


def _wrong_name(repo: str) -> InputError:
    return InputError(f"the name of a repository is USER/NAME, got {repo[:100]!r}")


def _package() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise InputError(
            f"the Hub needs huggingface_hub ({error}); install it with `pip install '.[hub]'` in the checkout"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _asking(hub: Any, repo: str, quiet: bool, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of huggingface_hub into `InputError`, and hide its progress bars if asked to."""
    # The bars move the cursor, even in a pipe.
    hidden = (quiet or not console.is_terminal) and not hub.utils.are_progress_bars_disabled()
    if hidden:
        hub.utils.disable_progress_bars()
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        message = _explain(hub.errors, error, repo, revision)
        if message is None:
            raise
        raise InputError(message) from error
    finally:
        if hidden:
            hub.utils.enable_progress_bars()


def _explain(errors: Any, error: BaseException, repo: str, revision: str | None) -> str | None:
    """Return what went wrong with the Hub and a remedy, or None for another error."""
    if isinstance(error, errors.HFValidationError):
        return str(_wrong_name(repo))
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated; ask for access on its page, then {_ANSWERS[401]}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no repository {repo}, or it is private; check the name, or {_ANSWERS[401]}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {str(revision)[:100]!r}; check the name"
    response = getattr(error, "response", None)
    if isinstance(error, errors.HfHubHTTPError) and response is not None:
        remedy = _ANSWERS.get(response.status_code, "try it again later")
        reason = printable(str(getattr(error, "server_message", None) or "no reason given"))[:200]
        return f"the Hub refused {repo} with status {response.status_code} ({reason}); {remedy}"
    unreachable = (
        errors.HTTPError,
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
        ConnectionError,
    )
    if isinstance(error, unreachable):
        cause = error.__cause__ or error
        why = printable(str(cause).strip().partition("\n")[0])[:200] or type(cause).__name__
        return f"the Hub did not answer ({why}); check the network, then give the same command again"
    if isinstance(error, JSONDecodeError):
        return f"the answer about {repo} is not that of a Hub; check HF_ENDPOINT"
    if isinstance(error, OSError):
        why = printable(error.strerror or str(error))[:200]
        remedy = "free space, or set HF_HOME to another folder"
        return f"a file of {repo} cannot be read or written ({why}); {remedy}"
    # Uploads run in threads, which wrap their errors.
    return None if error.__cause__ is None else _explain(errors, error.__cause__, repo, revision)


def _run_files(run: Path, checkpoint: bool) -> list[str]:
    """Return the names of the files of a run to upload."""
    refuse_links(run / "checkpoint", run / "policies")
    files = [name for name in (*_NEEDED, *_OPTIONAL) if name in _NEEDED or os.path.lexists(run / name)]
    files += [f"policies/{path.name}" for path in kept_policies(run).values()]
    if checkpoint:
        found = [f"{_CHECKPOINT}{path.name}" for path in sorted((run / "checkpoint").glob("epoch-*"))]
        found = [name for name in found if _NUMBERED.fullmatch(name)]
        if not found:
            raise InputError(f"{run} has no checkpoint; leave out --checkpoint")
        files.append(found[-1])
    return files


def _is_of_run(name: str) -> bool:
    return name in (*_NEEDED, *_OPTIONAL, _CARD) or _NUMBERED.fullmatch(name) is not None


def _stage(run: Path, checkpoint: bool, folder: Path) -> dict[str, Path]:
    """Copy the files of a run to an empty folder, and return the file to upload under each name.

    JSON loses the paths of this machine. A checkpoint, which may have gigabytes, stays where it is.
    """
    sources: dict[str, Path] = {}
    for name in _run_files(run, checkpoint):
        source, target = run / name, folder / name
        regular_file(source)
        if name.startswith(_CHECKPOINT):
            sources[name] = source
            continue
        sources[name] = target
        target.parent.mkdir(exist_ok=True)
        if source.suffix == ".json":
            write_json(target, _without_paths(read_json(source)))
            continue
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise InputError(
                f"cannot copy {source} to {target} ({error.strerror or error}); free space, or set TMPDIR to"
                " another folder"
            ) from error
    return sources


def _without_paths(value: Any) -> Any:
    """Return a value of a JSON file with the name of a file in place of each absolute path."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _choose(repo: str, names: list[str]) -> list[str]:
    """Return those of a repository's files that a run has.

    Raises:
        InputError: a path leads out of the repository, or the repository holds no run.
    """
    for name in names:
        parts = PurePosixPath(name).parts
        if not name.isprintable() or "\\" in name or name.startswith("/") or {"..", "."} & {*parts}:
            raise InputError(f"{repo} has a file {printable(name)[:100]!r}, which no run has; do not use it")
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise InputError(f"{repo} holds no run of mopo_fast: it lacks {', '.join(missing)}; check the name")
    files = [name for name in names if _is_of_run(name)]
    others = [name for name in names if not _is_of_run(name) and name != ".gitattributes"]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        logger.info("not downloaded from %s: %s%s", repo, ", ".join(others[:5]), more)
    return files


def _copy_cached(cache: Path, name: str, target: Path) -> None:
    """Copy a file out of huggingface_hub's cache, where a snapshot has links to the files' contents."""
    content = (cache / name).resolve()
    # A snapshot is REPOSITORY/snapshots/COMMIT.
    if not content.is_relative_to(cache.parents[1].resolve()):
        raise InputError(f"{cache / name} leads out of the cache; remove {cache.parents[1]}")
    regular_file(content)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(content, target)


def _check(folder: Path) -> None:
    """Read all files of a run but a checkpoint, which `train --resume` reads.

    Raises:
        InputError: a file is missing or damaged, or policy and dynamics are of other sizes.
    """
    for name in _NEEDED:
        regular_file(folder / name)
    if not holds_run(folder):
        raise InputError(f"{folder / 'config.json'} has no settings of a training")
    read_config(folder)
    actor, ensemble = Actor.load(folder), EnsembleDynamics.load(folder)
    if (actor.obs_dim, actor.act_dim) != (ensemble.obs_dim, ensemble.act_dim):
        raise InputError(
            f"policy.json has sizes {actor.obs_dim} and {actor.act_dim}, dynamics.json"
            f" {ensemble.obs_dim} and {ensemble.act_dim}"
        )
    for path in kept_policies(folder).values():
        Actor.load(folder, tensors_from=path)
    for name, read in (("summary.json", read_summary), ("fit.json", read_fit)):
        if (folder / name).is_file():
            read(folder)
    if (folder / "progress.csv").is_file():
        read_rows(folder / "progress.csv")
