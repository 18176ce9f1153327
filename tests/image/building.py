"""The base image by debootstrap, and the project's on it by buildah, with wheels that pip fetched outside."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_WHEELS_AT = "/mnt"  # a folder that every base has: a mount leaves nothing new in the image


def make_base(tag: str, *, suite: str, mirror: str, log: Path) -> None:
    """A minimal Debian of the suite, from the mirror (empty takes debootstrap's own), as an image."""
    with tempfile.TemporaryDirectory(prefix="raymoe-base-") as temporary:
        root, archive = Path(temporary) / "root", Path(temporary) / "base.tar"
        _run(["debootstrap", "--variant=minbase", suite, str(root), *filter(None, [mirror])], log)
        _run(["chroot", str(root), "apt-get", "clean"], log)
        _run(["tar", "-C", str(root), "-cf", str(archive), "."], log)
        _run(["podman", "import", "--quiet", str(archive), tag], log)


def fetch_wheels(directory: Path, *, log: Path) -> int:
    """Fetch what the image installs, by this Python's pip as it is configured; the number of wheels there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--dest",
        str(directory),
    ]
    command += ["--only-binary", ":all:", "--constraint", str(ROOT / "constraints.txt")]
    _run([*command, *wanted], log)
    return len(list(directory.glob("*.whl")))


def build(tag: str, *, base: str, wheels: Path, log: Path) -> None:
    """`make image` with buildah, on a base that is in the local store."""
    command = ["make", "image", "BUILDER=buildah", f"IMAGE={tag}", f"IMAGE_BASE={base}"]
    command += [f"PIP_ARGS=--no-index --find-links {_WHEELS_AT}"]
    command += [f"IMAGE_ARGS=--isolation chroot --pull-never --volume {wheels}:{_WHEELS_AT}:ro"]
    _run(command, log)


def exists(tag: str) -> bool:
    """Whether the image is in the local store."""
    return subprocess.run(["podman", "image", "exists", tag]).returncode == 0


def size(tag: str) -> int:
    """Bytes of an image, its base included."""
    form = ["--format", "{{.Size}}"]
    done = subprocess.run(
        ["podman", "image", "inspect", *form, tag], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def _run(command: Sequence[str], log: Path) -> None:
    """Run a command whose output goes to the end of a file.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
        raise SystemExit(
            "\n".join([*tail, f"{command[0]} failed ({done.returncode}); all of it is in {log}"])
        )
