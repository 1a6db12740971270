"""Small disks in memory, mounted in a private mount namespace."""

import os
import subprocess
import sys
from pathlib import Path

_INSIDE = "MOPO_FAST_SOAK_INSIDE"


def enter_namespace() -> None:
    """Restart this program in a private mount namespace, as root or as root of a user namespace.

    Returns in the restarted program, or at once if the system permits no namespaces. All mounts end with the
    program.
    """
    if _INSIDE in os.environ:
        return
    unshare = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else [])]
    try:
        subprocess.run([*unshare, "true"], check=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return
    os.environ[_INSIDE] = "1"
    os.execvp(unshare[0], [*unshare, *sys.orig_argv])


def why_not() -> str:
    """Return the reason why no disk can be mounted, or an empty string."""
    return "" if _INSIDE in os.environ else "no mount namespace is permitted here (see unshare)"


class Disk:
    """A tmpfs, mounted on `folder`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        _mount("-t", "tmpfs", "-o", f"size={size}", "soak", str(folder))

    def resize(self, size: int) -> None:
        _mount("-o", f"remount,size={size}", str(self.folder))

    def set_writable(self, writable: bool) -> None:
        _mount("-o", f"remount,{'rw' if writable else 'ro'}", str(self.folder))

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
