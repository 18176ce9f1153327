"""The configuration of HAProxy for one front, as a text.

What is decided about a request, in this order, before its body is read: connections of all clients and of one
address, size and time of the header, method, API key, rate, size of the body, and a place among the bodies
that may be read at a time. Bodies are passed on as they come, and not kept here.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from jobs.api.key_check import FRONT_HEADER, OPEN_PATHS
from jobs.serving.front import front_errors as errors
from jobs.serving.front.front_errors import quoted
from jobs.serving.front_config import FrontConfig

MAXREWRITE = 1024  # bytes of a buffer that HAProxy keeps for header fields that it adds itself
MEDIUM_BODY, SMALL_BODY = 1 << 20, 64 << 10
METRICS_PATHS = ("/metrics", *OPEN_PATHS)
"""Paths of the port for metrics, which needs no API key."""

_METRICS_CONNECTIONS = 64
_THREADS = 2
_CHUNKED_BYTES = 16 << 20  # per second, of a body whose size is not announced
_HEALTH_BYTES, _HEALTH_SECONDS = 1024, 2
_SHUTDOWN_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPlan:
    """What one front listens on and passes requests to.

    Attributes:
        host: Network interface of the ports.
        port: Port for HTTP.
        grpc_port: Port for gRPC, None for none.
        metrics_port: Port for metrics and health without a key, None for none.
        http: Host and port of Ray Serve's proxy.
        grpc: Host and port of the interface's gRPC server; needed with `grpc_port`.
        folder: Private directory of this front.
        limits: The limits.
        largest_body: Bytes of the largest body.
        needs_key: Whether requests need one of the API keys in `keys_file`.
        token: What the port for metrics sends in `FRONT_HEADER`.
    """

    host: str
    port: int
    http: str
    folder: Path
    limits: FrontConfig
    largest_body: int
    needs_key: bool
    token: str
    grpc_port: int | None = None
    grpc: str | None = None
    metrics_port: int | None = None

    @property
    def keys_file(self) -> Path:
        """File with the SHA-256 digests of the API keys, one a line."""
        return self.folder / "key_digests"

    @property
    def admin_socket(self) -> Path:
        """Unix socket by which digests and certificates are exchanged."""
        return self.folder / "admin.sock"

    @property
    def certificate(self) -> Path:
        """File with the certificate and its key, if the ports have TLS."""
        return self.folder / "certificate.pem"

    @property
    def error_files(self) -> dict[int, Path]:
        """Files with the pages that take the place of HAProxy's own, by status."""
        return {status: self.folder / f"{status}.http" for status in errors.GENERAL}

    @property
    def ports(self) -> dict[str, int]:
        """The ports to listen on, by the option that sets them."""
        named = {"--port": self.port, "--grpc-port": self.grpc_port, "listen.metrics_port": self.metrics_port}
        return {name: port for name, port in named.items() if port is not None}


def haproxy_config(plan: FrontPlan) -> str:
    """The configuration file of a front."""
    parts = [_global(plan), _defaults(plan), _tables(plan), _http_frontend(plan)]
    parts += [_backend(name, plan, slots) for name, slots in _backends(plan).items()]
    if plan.grpc_port is not None:
        parts += [_grpc_frontend(plan)]
    if plan.metrics_port is not None:
        parts += [_metrics_frontend(plan)]
    return "\n".join("\n".join([part[0], *(f"    {line}" for line in part[1:])]) + "\n" for part in parts)


def _global(plan: FrontPlan) -> list[str]:
    limits = plan.limits
    total = limits.connections * (1 if plan.grpc_port is None else 2) + _METRICS_CONNECTIONS
    return [
        "global",
        f"stats socket {quoted(str(plan.admin_socket))} mode 600 level admin",
        "log stderr format raw daemon notice",
        f"maxconn {total}",
        f"nbthread {_THREADS}",
        "noreuseport",  # otherwise a second front on this port would start, and get half of the clients
        f"hard-stop-after {_SHUTDOWN_SECONDS}s",
        f"tune.bufsize {limits.header_bytes + MAXREWRITE}",
        f"tune.maxrewrite {MAXREWRITE}",
        f"tune.http.maxhdr {limits.header_count}",
        "ssl-default-bind-options ssl-min-ver TLSv1.2",
    ]


def _defaults(plan: FrontPlan) -> list[str]:
    limits = plan.limits
    return [
        "defaults",
        "mode http",
        "log global",
        "timeout connect 5s",
        f"timeout client {_ms(limits.stall_timeout)}",
        f"timeout server {_ms(limits.silence_timeout)}",
        "timeout queue 10s",
        f"timeout http-request {_ms(limits.header_timeout)}",
        f"timeout http-keep-alive {_ms(limits.idle_timeout)}",
        "retries 2",
        "retry-on conn-failure",
        "option abortonclose",  # a client that disconnects ends its request in the queue and in the backend
        "option http-server-close",  # a kept connection could be closed by the other end just as it is used
        "option http-no-delay",
        "option dontlognull",
        "option http-ignore-probes",  # a connection without a byte is closed without an answer
        *(f"errorfile {status} {quoted(str(file))}" for status, file in plan.error_files.items()),
    ]


def _ms(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _tables(plan: FrontPlan) -> list[str]:
    return [
        "backend addresses",
        "stick-table type ipv6 size 100k expire 2m store conn_cur",
        "",
        "backend callers",
        "stick-table type string len 64 size 100k expire 2m store http_req_rate(1m)",
    ]


def _bind(plan: FrontPlan, port: int, protocol: str) -> str:
    host = plan.host
    try:
        address = ipaddress.ip_address(host)
        shown = f"ipv{address.version}@{'[' + host + ']' if address.version == 6 else host}:{port}"
    except ValueError:
        shown = f"{host}:{port}"
    dual = " v4v6" if host == "::" else ""
    if plan.limits.tls_certificate is None:
        return f"bind {shown}{dual} proto {protocol}"
    alpn = {"h1": "http/1.1", "h2": "h2"}[protocol]
    return f"bind {shown}{dual} ssl crt {quoted(str(plan.certificate))} alpn {alpn} proto {protocol}"


def _connection_rules(plan: FrontPlan) -> list[str]:
    return [
        f"maxconn {plan.limits.connections}",
        "tcp-request connection track-sc0 src,ipmask(32,64) table addresses",
        f"tcp-request connection reject if {{ sc0_conn_cur(addresses) gt {plan.limits.per_address} }}",
    ]


def _key_rules(plan: FrontPlan, refusal: str) -> list[str]:
    """Lines that check the key, before a byte of the body; digests alone are compared."""
    if not plan.needs_key:
        return []
    token = "req.fhdr(authorization),regsub('^ *bearer +','',i),regsub(' +$','')"
    return [
        f"http-request set-var(txn.digest) {token},sha2(256),hex,lower",
        "acl one_bearer req.fhdr(authorization) -m reg -i '^ *bearer +[^ ]'",
        f"acl known_key var(txn.digest) -m str -f {quoted(str(plan.keys_file))}",
        "acl several_keys req.fhdr_cnt(authorization) gt 1",
        f"http-request {refusal} if !health several_keys",
        f"http-request {refusal} if !health !one_bearer",
        f"http-request {refusal} if !health !known_key",
    ]


def _body_rules(condition: str) -> list[str]:
    """Lines that refuse bodies of requests that need no key, whose size is announced or not."""
    return [
        "acl bodied req.body_size gt 0",
        "acl bodied req.hdr_cnt(transfer-encoding) gt 0",
        f"http-request return {errors.NO_BODY.reply()} if bodied {condition}".rstrip(),
    ]


def _rate_rules(plan: FrontPlan, refusal: str) -> list[str]:
    limit = plan.limits.requests_per_minute
    if limit is None:
        return []
    caller = "var(txn.digest)" if plan.needs_key else "src,ipmask(32,64)"
    return [
        f"http-request track-sc1 {caller} table callers if !health",
        f"http-request {refusal} if {{ sc1_http_req_rate(callers) gt {limit} }}",
    ]


def _http_frontend(plan: FrontPlan) -> list[str]:
    limits = plan.limits
    full = f"fe_conn ge {max(1, limits.connections * 3 // 4)}"
    return [
        "frontend http",
        _bind(plan, plan.port, "h1"),
        *_connection_rules(plan),
        f"filter bwlim-in unannounced default-limit {_CHUNKED_BYTES} default-period 1s",
        f"http-after-response set-header Connection close if {{ {full} }}",
        f"acl health path {' '.join(OPEN_PATHS)}",
        f"http-request return {errors.NO_METHOD.reply()} if {{ method CONNECT TRACE }}",
        f"http-request del-header {FRONT_HEADER}",
        "http-request del-header Upgrade",
        *_body_rules("health"),
        *_key_rules(plan, f"return {errors.NO_KEY.reply()}"),
        *_rate_rules(plan, f"return {errors.RATE_LIMITED.reply()}"),
        f"http-request return {errors.too_large(plan.largest_body).reply()}"
        f" if {{ req.body_size gt {plan.largest_body} }}",
        # What was compared is what is passed on, however it was spelled.
        *(f"http-request set-uri {path} if {{ path {path} }}" for path in OPEN_PATHS),
        "acl unannounced req.hdr_cnt(transfer-encoding) gt 0",
        "http-request set-bandwidth-limit unannounced if unannounced",
        "use_backend large if unannounced",
        f"use_backend large if {{ req.body_size gt {MEDIUM_BODY} }}",
        f"use_backend medium if {{ req.body_size gt {SMALL_BODY} }}",
        "default_backend small",
    ]


def _backends(plan: FrontPlan) -> dict[str, int]:
    """Requests that are passed on at a time, by the size of their bodies."""
    half = plan.limits.body_memory // 2
    return {
        "small": plan.limits.connections,
        "medium": max(1, half // MEDIUM_BODY),
        "large": max(1, half // plan.largest_body),
    }


def _backend(name: str, plan: FrontPlan, slots: int) -> list[str]:
    """A backend; error pages of Ray Serve, which are plain text, get OpenAI's shape."""
    plain = "{ res.hdr(content-type) -m beg text/plain }"
    return [
        f"backend {name}",
        f"http-response return {errors.AWAY.reply()} if {{ status 404 502 503 504 }} {plain}",
        f"http-response return {errors.BAD_REQUEST.reply()} if {{ status 400:499 }} {plain}",
        f"http-response return {errors.FAILED.reply()} if {{ status 500:599 }} {plain}",
        f"server serve {plan.http} maxconn {slots}",
    ]


def _grpc_frontend(plan: FrontPlan) -> list[str]:
    trailers = "return status 200 hdr grpc-status {} hdr grpc-message {}"
    refused = trailers.format(16, quoted(errors.NO_KEY.message))
    limited = trailers.format(8, quoted(errors.RATE_LIMITED.message))
    too_large = trailers.format(8, quoted(f"the message is too large; {_HEALTH_BYTES} bytes at most"))
    assert plan.grpc_port is not None
    return [
        "frontend grpc",
        _bind(plan, plan.grpc_port, "h2"),
        *_connection_rules(plan),
        # Answers without a body get no type from `return`, and some clients insist on one.
        "acl typed res.hdr(content-type) -m found",
        "http-after-response set-header content-type application/grpc unless typed",
        f"http-request del-header {FRONT_HEADER}",
        "acl health path_beg /grpc.health.v1.Health/",
        *_key_rules(plan, refused),
        *_rate_rules(plan, limited),
        # Who asks for the health without a key sends the name of a service, and no message of 16 MiB.
        f"http-request wait-for-body time {_HEALTH_SECONDS}s at-least {_HEALTH_BYTES + 1} if health",
        f"http-request {too_large} if health {{ req.body_size gt {_HEALTH_BYTES} }}",
        "default_backend grpc_servers",
        "",
        "backend grpc_servers",
        "http-reuse never",  # a connection for each client, which spreads them over the interface's processes
        f"server interface {plan.grpc} proto h2 maxconn {plan.limits.connections}",
    ]


def _metrics_frontend(plan: FrontPlan) -> list[str]:
    assert plan.metrics_port is not None
    return [
        "frontend metrics",
        _bind(plan, plan.metrics_port, "h1"),
        f"maxconn {_METRICS_CONNECTIONS}",
        f"acl served path {' '.join(METRICS_PATHS)}",
        f"http-request return {errors.NO_METHOD.reply()} unless {{ method GET HEAD }}",
        f"http-request return {errors.NOT_HERE.reply()} unless served",
        *_body_rules(""),
        *(f"http-request set-uri {path} if {{ path {path} }}" for path in METRICS_PATHS),
        "http-request del-header authorization",
        f"http-request set-header {FRONT_HEADER} {quoted(plan.token)}",
        "default_backend small",
    ]


__all__ = ["FrontPlan", "haproxy_config"]
