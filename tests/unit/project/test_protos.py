"""The generated code is up to date and importable, and keeps the guarantees of the .proto files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from protos import coordinator_pb2, coordinator_pb2_grpc, expert_pb2, generate, router_pb2_grpc

PROTOS = Path(generate.__file__).parent


def test_the_generated_code_is_current(tmp_path: Path) -> None:
    missing = generate.missing_tools()
    if missing:
        pytest.skip(f"needs {' '.join(missing)} (extra `protos`, in an environment of its own)")
    generate.generate(tmp_path)
    for name in generate.generated_files():
        assert (tmp_path / "protos" / name).read_text() == (PROTOS / name).read_text(), name


def test_every_source_is_generated_and_checked_in() -> None:
    assert {path.stem for path in PROTOS.glob("*.proto")} == set(generate.MESSAGES)
    found = {path.name for path in PROTOS.glob("*_pb2*")}
    assert found == set(generate.generated_files())


@pytest.mark.parametrize("name", generate.MESSAGES)
def test_the_generated_code_holds_every_name_of_its_source(name: str) -> None:
    # Where the tools are missing, this still finds a source that was changed without generating.
    module = __import__(f"protos.{name}_pb2", fromlist=["DESCRIPTOR"])
    source = re.sub(r"//.*", "", (PROTOS / f"{name}.proto").read_text())
    declared = set(re.findall(r"(\w+) = (\d+);", source))
    declared |= {(method, "rpc") for method in re.findall(r"rpc (\w+)", source)}
    described = set()
    for message in module.DESCRIPTOR.message_types_by_name.values():
        described |= {(field.name, str(field.number)) for field in message.fields}
    for enum in module.DESCRIPTOR.enum_types_by_name.values():
        described |= {(value.name, str(value.number)) for value in enum.values}
    for service in module.DESCRIPTOR.services_by_name.values():
        described |= {(method.name, "rpc") for method in service.methods}
    assert declared == described


def test_the_frame_keeps_its_payload_last() -> None:
    fields = expert_pb2.Frame.DESCRIPTOR.fields
    assert max(field.number for field in fields) == expert_pb2.Frame.PAYLOAD_FIELD_NUMBER


def test_the_control_plane_carries_no_stream() -> None:
    service = coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"]
    assert not any(method.client_streaming or method.server_streaming for method in service.methods)
    assert coordinator_pb2_grpc.CoordinatorStub and router_pb2_grpc.RouterStub
