"""Control calls over gRPC: the server, and clients with the methods of the classes that they call."""

from __future__ import annotations
