"""The check of the ports of `raymoe serve`."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from errors import ConfigError, ResourceError
from jobs.serving.ports import ListenAddress


def _free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
@pytest.mark.parametrize("option", ["port", "grpc_port"])
def test_a_port_in_use_is_refused(option: str, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {"port": _free(), "grpc_port": _free(), option: taken.getsockname()[1]}
        said = re.escape(f"--{option.replace('_', '-')} {ports[option]} is not available")
        with pytest.raises(ResourceError, match=said):
            ListenAddress(host=host, **ports).check_free()
    ListenAddress(host=host, **ports).check_free()


def test_an_address_that_cannot_be_listened_on_names_its_option() -> None:
    with pytest.raises(ConfigError, match="--port and --grpc-port are both 8000"):
        ListenAddress(host="127.0.0.1", port=8000, grpc_port=8000).check_free()
    with pytest.raises(ConfigError, match="--host no such host is no network interface"):
        ListenAddress(host="no such host", port=_free()).check_free()
    with pytest.raises(ResourceError, match="--port"):  # an address of another machine
        ListenAddress(host="192.0.2.1", port=_free()).check_free()


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_the_loopback_is_known(host: str, loopback: bool) -> None:
    assert ListenAddress(host=host, port=1).loopback is loopback


def test_a_refused_serve_has_imported_nothing_large(tmp_path: Path) -> None:
    """Empty addresses name no cluster, so the ports are those of this machine."""
    script = (
        "import sys; from jobs.cli.app import app; code = app(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules]); sys.exit(code)"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", script, "serve", str(tmp_path), "--port", str(port), "--address="],
            env=os.environ | {"RAY_ADDRESS": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stdout == "[]\n"
    assert done.stderr.startswith(f"error: --port {port} is not available")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 1


@pytest.mark.slow
def test_reload_needs_no_torch() -> None:
    script = (
        "import sys, jobs.serving.reload; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: HAProxy"),
        (["--set", "serving.front.tls_certificate=a.crt"], "serving.front.tls_certificate: HAProxy"),
    ],
)
def test_without_haproxy_its_work_is_refused(tmp_path: Path, options: list[str], said: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.cli", "serve", str(tmp_path)),
            *(*options, "--port", str(_free())),
        ],
        env=os.environ | {"RAY_SERVE_HAPROXY_BINARY_PATH": str(tmp_path / "none"), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


@pytest.mark.parametrize(("secure", "scheme"), [(False, "http"), (True, "https")])
def test_the_url_says_whether_the_port_speaks_tls(secure: bool, scheme: str) -> None:
    assert ListenAddress(port=9000).url("[::1]", secure=secure) == f"{scheme}://[::1]:9000"
