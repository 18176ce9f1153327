"""Mutual TLS: accepted and refused peers, and certificates replaced while servers run."""

from __future__ import annotations

import os
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc as grpc_library
import pytest
import torch
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from typer.testing import CliRunner

from actors.host import ExpertHost, HostSettings, InitialExperts
from actors.host.host_server import ExpertHostServer
from actors.rpc.host_client import HostClient
from channels.base import Phase, Request, RequestId
from channels.grpc import channel as grpc
from channels.grpc import tls
from cluster.config import ClusterConfig
from errors import ChannelError, ConfigError
from jobs.cli.app import app
from jobs.fleet.expert_hosts import check_transport
from jobs.tools import certs
from jobs.tools.certs import CA_KEY, make_certificates
from support.tiny_cluster import CONFIG, LAYERS, SeededSource

NAME = RequestId(run="r", epoch=0, step=0, microbatch=0, layer=0, phase=Phase.INFER, router="test")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_certificates(tmp_path / "tls", days=1, ca_days=1)
    monkeypatch.setenv(tls.VARIABLE, str(tmp_path / "tls"))
    return tmp_path / "tls"


def echo(request: Request) -> tuple[torch.Tensor, ...]:
    return request.tensors


def answers(address: str) -> bool:
    """Whether a channel to the address works."""
    try:
        channel = grpc.connect(address, timeout=20)
    except ChannelError:
        return False
    try:
        (back,) = channel.submit(Request(id=NAME, tensors=(torch.ones(3),))).result(20)
        return bool(torch.equal(back, torch.ones(3)))
    finally:
        channel.close()


def test_both_ends_show_certificates_of_one_authority(folder: Path) -> None:
    server = grpc.serve(echo)
    assert answers(server.address)
    server.close()


def test_plaintext_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = grpc.serve(echo)
    with monkeypatch.context() as without:
        without.delenv(tls.VARIABLE)
        assert not answers(server.address)
    plain = None
    with monkeypatch.context() as without:
        without.delenv(tls.VARIABLE)
        plain = grpc.serve(echo)
        assert answers(plain.address)
    assert not answers(plain.address)  # nor does one with TLS talk to one without
    plain.close()
    server.close()


def test_another_authority_is_refused_by_either_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificates(tmp_path / "other", days=1, ca_days=1)
    server = grpc.serve(echo)
    for ca in (False, True):  # a client that trusts the server, and one that does not
        with monkeypatch.context() as foreign:
            foreign.setenv(tls.VARIABLE, str(tmp_path / "other"))
            if not ca:
                shutil.copy(folder / tls.CA, tmp_path / "other" / tls.CA)
            assert not answers(server.address)
    assert answers(server.address)
    server.close()


def test_a_client_without_a_certificate_is_refused(folder: Path) -> None:
    server = grpc.serve(echo)
    credentials = grpc_library.ssl_channel_credentials((folder / tls.CA).read_bytes())
    options = [("grpc.ssl_target_name_override", tls.NAME)]
    target = server.address.removeprefix("grpc:")
    with (
        grpc_library.secure_channel(target, credentials, options=options) as channel,
        pytest.raises(grpc_library.RpcError),
    ):
        channel.unary_unary("/raymoe.v1.Expert/Ping", None, None)(b"", timeout=20)
    server.close()


def test_an_expired_certificate_is_refused_by_either_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "expired")
    make_certificates(tmp_path / "expired", days=1, ca_days=1, now=datetime.now(UTC) - timedelta(days=3))
    server = grpc.serve(echo)
    with monkeypatch.context() as late:
        late.setenv(tls.VARIABLE, str(tmp_path / "expired"))
        assert not answers(server.address)
        stale = grpc.serve(echo)
    assert not answers(stale.address)
    assert answers(server.address)
    stale.close()
    server.close()


def test_files_that_are_replaced_count_from_the_next_handshake(folder: Path, tmp_path: Path) -> None:
    initial = InitialExperts(source=SeededSource(), experts={LAYERS[0]: (0,)})
    host = ExpertHost("host-0", CONFIG, initial, settings=HostSettings(dtype=torch.float64))
    server = ExpertHostServer(host)
    client = HostClient(server.info, timeout=20)
    client.ping(20)
    before = grpc.connect(server.info.addresses["grpc"])
    # A different authority: certificates of the first one are worthless.
    make_certificates(tmp_path / "new", days=1, ca_days=1)
    for name in (tls.CA, tls.KEY, tls.CERTIFICATE):
        os.replace(tmp_path / "new" / name, folder / name)
    client.ping(20)  # over a new connection, with the new certificate
    grpc.connect(server.info.addresses["grpc"]).close()
    before.close()  # an open connection goes on
    client.close()
    server.close()


def test_a_file_that_is_missing_for_a_moment_fails_no_call(folder: Path, tmp_path: Path) -> None:
    initial = InitialExperts(source=SeededSource(), experts={LAYERS[0]: (0,)})
    host = ExpertHost("host-0", CONFIG, initial, settings=HostSettings(dtype=torch.float64))
    server = ExpertHostServer(host)
    client = HostClient(server.info, timeout=20)
    client.ping(20)
    shutil.copytree(folder, tmp_path / "new")
    make_certificates(tmp_path / "new", days=1, ca_days=1)  # of the same authority
    for name in (tls.CA, tls.KEY, tls.CERTIFICATE):  # as `rm` and `cp` do, a file at a time
        (folder / name).unlink()
        client.ping(20)
        shutil.copy(tmp_path / "new" / name, folder / name)
        client.ping(20)  # with a set that does not fit, until the last one is there
    grpc.connect(server.info.addresses["grpc"]).close()
    client.close()
    server.close()


def test_a_file_that_becomes_readable_later_counts(folder: Path, tmp_path: Path) -> None:
    """Changing owner or mode changes neither the time nor the size of a file."""
    server = grpc.serve(echo)
    seen = tls._signature(folder)
    (folder / tls.KEY).chmod(0o400)
    assert tls._signature(folder) != seen
    assert answers(server.address)
    server.close()


def test_transport_is_looked_at_before_anything_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_transport(ClusterConfig(channel="grpc", expert_hosts=2))
    with pytest.raises(ConfigError, match=r"cluster\.channel: collective is not encrypted"):
        check_transport(ClusterConfig(channel="collective", expert_hosts=2))
    (folder / tls.KEY).unlink()
    with pytest.raises(ConfigError, match="RAYMOE_TLS_DIR"):
        check_transport(ClusterConfig())
    monkeypatch.delenv(tls.VARIABLE)
    check_transport(ClusterConfig(channel="collective", expert_hosts=2))


def test_of_two_certificates_of_an_authority_the_later_one_signs(folder: Path) -> None:
    old = (folder / tls.CA).read_bytes()
    key = (folder / CA_KEY).read_bytes()
    expired = folder.with_name("expired")
    expired.mkdir()
    pair = certs._read_authority(folder)
    assert pair is not None
    now = datetime.now(UTC)
    past = certs._builder(
        pair.certificate.subject, pair.certificate.subject, pair.key, now - timedelta(days=9), 1
    )
    stale = past.sign(pair.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (expired / tls.CA).write_bytes(stale + old)
    (expired / CA_KEY).write_bytes(key)
    assert not make_certificates(expired, days=0.5, ca_days=1)["new_authority"]


def test_an_authority_that_does_not_sign_here_is_named(folder: Path) -> None:
    own = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / CA_KEY).write_bytes(pem)
    with pytest.raises(ConfigError, match="no key of an elliptic curve"):
        make_certificates(folder, days=1, ca_days=1)
    (folder / CA_KEY).write_text("junk")
    with pytest.raises(ConfigError, match="hold no authority that can be read"):
        make_certificates(folder, days=1, ca_days=1)


def why_not(address: str) -> str:
    with pytest.raises(ChannelError) as refused:
        grpc.connect(address, timeout=20)
    return str(refused.value)


def test_why_two_do_not_connect_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificates(tmp_path / "other", days=1, ca_days=1)
    server = grpc.serve(echo)
    with monkeypatch.context() as foreign:
        foreign.setenv(tls.VARIABLE, str(tmp_path / "other"))
        assert "certificates of one authority, or neither: compare RAYMOE_TLS_DIR" in why_not(server.address)
        foreign.delenv(tls.VARIABLE)
        assert "certificates of one authority, or neither: compare RAYMOE_TLS_DIR" in why_not(server.address)
    server.close()
    gone = why_not(server.address)
    assert "no process listens at" in gone and tls.VARIABLE not in gone


def test_a_key_of_another_certificate_and_no_pem_are_named(folder: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "other", days=1, ca_days=1)
    shutil.copy(tmp_path / "other" / tls.KEY, folder / tls.KEY)
    with pytest.raises(ConfigError, match=r"RAYMOE_TLS_DIR: .*tls\.key is not the key of tls\.crt"):
        grpc.serve(echo)
    for name in (tls.CA, tls.CERTIFICATE, tls.KEY):
        shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)
        (folder / name).write_text("garbage")
        with pytest.raises(ConfigError, match=f"RAYMOE_TLS_DIR: .*{name} holds no PEM"):
            tls.identity(folder)


def test_of_two_trusted_authorities_the_one_with_the_key_signs(folder: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path / "next", days=1, ca_days=1)
    both = (folder / tls.CA).read_bytes() + (tmp_path / "next" / tls.CA).read_bytes()
    (tmp_path / "next" / tls.CA).write_bytes(both)
    assert not make_certificates(tmp_path / "next", days=1, ca_days=1)["new_authority"]
    assert (tmp_path / "next" / tls.CA).read_bytes() == both


def test_again_gives_a_new_certificate_of_the_same_authority(folder: Path) -> None:
    ca, certificate = (folder / tls.CA).read_bytes(), (folder / tls.CERTIFICATE).read_bytes()
    made = make_certificates(folder, days=1, ca_days=1)
    assert not made["new_authority"]
    assert (folder / tls.CA).read_bytes() == ca
    assert (folder / tls.CERTIFICATE).read_bytes() != certificate
    for key in (CA_KEY, tls.KEY):
        assert stat.S_IMODE((folder / key).stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [CA_KEY, tls.CA, tls.CERTIFICATE, tls.KEY]
    )


@pytest.mark.parametrize("name", [tls.CA, tls.CERTIFICATE, tls.KEY])
def test_a_directory_that_lacks_a_file_is_one_line(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"RAYMOE_TLS_DIR: .*{name} cannot be read .*raymoe certs"):
        tls.identity(folder)
    (folder / name).touch()
    with pytest.raises(ConfigError, match=f"{name} is empty"):
        tls.identity(folder)


def test_half_an_authority_is_refused(folder: Path) -> None:
    (folder / CA_KEY).unlink()
    with pytest.raises(ConfigError, match="not the other half of an authority"):
        make_certificates(folder, days=1, ca_days=1)


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    first = runner.invoke(app, ["certs", str(tmp_path / "tls")])
    assert first.exit_code == 0 and first.output.startswith("authority and certificate in")
    second = runner.invoke(app, ["certs", str(tmp_path / "tls"), "--json"])
    assert second.exit_code == 0 and '"new_authority": false' in second.output
    (tmp_path / "file").touch()
    wrong = runner.invoke(app, ["certs", str(tmp_path / "file")])
    assert wrong.exit_code == 2 and "yours to write to" in wrong.output
    nameless = runner.invoke(app, ["certs", ""])
    assert nameless.exit_code == 2 and "DIRECTORY is empty" in nameless.output
