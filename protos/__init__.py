"""What travels between processes: the .proto files (package raymoe.v1) and the code made from them.

Import the generated modules by name, `from protos import expert_pb2, expert_pb2_grpc`. After a change
of a .proto file run `python -m protos.generate`.
"""

from __future__ import annotations

__all__: list[str] = []
