"""Write the generated code: `python -m protos.generate`, from the project's root.

The code is made with an old grpcio-tools on purpose: generated code refuses a runtime older than the
tools it was made with, and runs under a newer one up to the next major version but one. The versions
are pinned by the extra `protos` (`pip install -e '.[protos]'`, best in an environment of its own, since
these tools hold protobuf and grpcio back).
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

TOOLS = {"grpcio-tools": "1.72.2", "mypy-protobuf": "3.6.0"}
MESSAGES = ("admin", "coordinator", "expert", "generation", "router", "tensor", "trunk")
SERVICES = ("admin", "coordinator", "expert", "generation", "router", "trunk")
ROOT = Path(__file__).resolve().parent.parent


def missing_tools() -> list[str]:
    """The requirements of `TOOLS` that are not installed in this very version."""

    def installed(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return [f"{name}=={version}" for name, version in TOOLS.items() if installed(name) != version]


def generated_files() -> list[str]:
    """Names within `protos/` of everything that `generate` writes."""
    stems = [f"{name}_pb2" for name in MESSAGES] + [f"{name}_pb2_grpc" for name in SERVICES]
    return sorted(f"{stem}.{kind}" for stem in stems for kind in ("py", "pyi"))


def generate(out: Path) -> None:
    """Write `out/protos/*_pb2*` from the .proto files.

    Raises:
        SystemExit: a tool is missing, or protoc refused a file.
    """
    missing = missing_tools()
    if missing:
        raise SystemExit(f"protos.generate needs {' '.join(missing)}: pip install {' '.join(missing)}")
    from grpc_tools import protoc

    plugins = Path(sys.executable).parent
    messages = [f"--python_out={out}", f"--mypy_out=quiet:{out}"]
    services = [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
    for names, outputs in ((MESSAGES, messages), (SERVICES, services)):
        arguments = [
            "protoc",
            f"--proto_path={ROOT}",
            f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
            *outputs,
            *(f"protos/{name}.proto" for name in names),
        ]
        if protoc.main(arguments):
            raise SystemExit("protos.generate: protoc refused a file, see above")


if __name__ == "__main__":
    generate(ROOT)
    print(f"wrote {len(generated_files())} files to {ROOT / 'protos'}")
