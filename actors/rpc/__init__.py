"""Control calls over gRPC: the server, and clients with the methods of the plain classes."""

from __future__ import annotations
