"""The certificate of a front: what its files may hold, how it is exchanged, and that its key is not shown."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from errors import ConfigError
from jobs.serving.front.certificate import certificate_text
from jobs.serving.front_config import FrontConfig
from tests.support.fronted_app import Fronted, fronted, request

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
LOCKS = serialization.BestAvailableEncryption(b"a passphrase")


@dataclass(frozen=True)
class Pair:
    """A self-signed certificate and its key, in PEM."""

    certificate: str
    key: str
    locked: str
    locked_old: str


def pair(name: str) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    old = serialization.PrivateFormat.TraditionalOpenSSL
    return Pair(
        made.public_bytes(PEM).decode(),
        key.private_bytes(PEM, PKCS8, serialization.NoEncryption()).decode(),
        key.private_bytes(PEM, PKCS8, LOCKS).decode(),
        key.private_bytes(PEM, old, LOCKS).decode(),
    )


A, B = pair("a"), pair("b")


@dataclass
class Files:
    """The two files that a front follows."""

    certificate: Path
    key: Path

    def write(self, certificate: str, key: str) -> None:
        for path, text in ((self.certificate, certificate), (self.key, key)):
            new = path.with_suffix(".new")
            new.write_text(text)
            new.replace(path)

    @property
    def limits(self) -> FrontConfig:
        return FrontConfig(tls_certificate=self.certificate, tls_key=self.key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path / "tls.crt", tmp_path / "tls.key")
    made.write(A.certificate, A.key)
    return made


@pytest.fixture
def front(tmp_path: Path, files: Files) -> Iterator[Fronted]:
    folder = tmp_path / "front"
    folder.mkdir()
    with fronted(folder, tls_certificate=files.certificate, tls_key=files.key) as made:
        yield made


def shown(front: Fronted) -> str:
    """The certificate that a client is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(front.connect()) as connection:
        der = connection.getpeercert(binary_form=True)
        assert der is not None
        connection.sendall(request())
    return ssl.DER_cert_to_PEM_cert(der)


def assert_no_line_of(key: str, text: str) -> None:
    assert not [line for line in key.splitlines() if line and line in text]


COMMENTS = f"subject=für alle\n\n{A.certificate}\n\nthe chain:\r\n\r\n{B.certificate}\n\n"


@pytest.mark.parametrize("certificate", [COMMENTS, f"\ufeff{A.certificate}".replace("\n", "\r\n")])
def test_comments_and_blank_lines_are_no_part_of_the_text(files: Files, certificate: str) -> None:
    files.certificate.write_bytes(certificate.encode())
    text = certificate_text(files.limits)
    assert text is not None
    assert "\n\n" not in text
    assert text.startswith(A.certificate)
    assert text.endswith(A.key)


def test_one_file_may_hold_both(files: Files) -> None:
    files.certificate.write_text(f"{A.key}\n{A.certificate}")
    assert certificate_text(FrontConfig(tls_certificate=files.certificate)) == A.certificate + A.key
    assert certificate_text(FrontConfig()) is None


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("", A.key, r"tls_certificate: .*tls.crt holds no certificate"),
        ("hello", A.key, r"tls_certificate: .*tls.crt holds no certificate"),
        (A.certificate, "", r"tls_key: .*tls.crt and .*tls.key hold no private key"),
        (A.certificate, B.key, r"tls_key: the private key in .*tls.key is not that of the first certificate"),
        (B.certificate + A.certificate, A.key, "not that of the first certificate"),
        (A.certificate, A.locked, r"tls_key: the private key in .*tls.key has a passphrase"),
        (A.certificate, A.locked_old, r"tls_key: the private key in .*tls.key has a passphrase"),
        (A.certificate.replace("MII", "MIJ", 1), A.key, r"tls_certificate: a certificate in .* is damaged"),
        (A.certificate, A.key[:40] + A.key[60:], r"tls_key: the private key in .* cannot be read"),
        (A.certificate + "x" * (1 << 20), A.key, "it has 1,049,"),
    ],
)
def test_files_that_cannot_be_used_are_one_line_without_the_key(
    files: Files, certificate: str, key: str, said: str
) -> None:
    files.write(certificate, key)
    with pytest.raises(ConfigError, match=rf"^serving\.front\..*{said}") as caught:
        certificate_text(files.limits)
    assert "\n" not in str(caught.value)
    assert_no_line_of(key, str(caught.value))


def test_what_is_no_file_is_refused_and_not_opened(files: Files, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path, "a directory"),
        (tmp_path / "no", "not exist"),
    ):
        with pytest.raises(ConfigError, match=rf"tls_key: .*{said}"):
            certificate_text(FrontConfig(tls_certificate=files.certificate, tls_key=path))


def test_relative_paths_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    limits = FrontConfig(tls_certificate=Path("a.crt"), tls_key=Path("~/a.key"))
    assert limits.tls_certificate == tmp_path / "a.crt"
    assert limits.tls_key == Path.home() / "a.key"


@pytest.mark.parametrize(
    ("certificate", "key"),
    [(A.certificate, B.key), ("", B.key), ("\n\n" + B.certificate[:100], B.key), (B.certificate, B.locked)],
)
def test_an_exchange_that_fails_hinders_no_later_one(
    front: Fronted, files: Files, certificate: str, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    files.write(certificate, key)
    with pytest.raises(ConfigError, match=r"serving\.front\.tls_") as caught:
        front.process.follow_certificate()
    assert "\n" not in str(caught.value)
    front.process.follow_certificate()  # says it once
    assert shown(front) == A.certificate
    files.write(f"\n\n{B.certificate}\n\n{A.certificate}", f"a comment\n\n{B.key}")
    front.process.follow_certificate()
    assert shown(front) == B.certificate
    output = "".join(capfd.readouterr())
    assert_no_line_of(B.key, output)


def test_a_transaction_that_was_left_open_hinders_no_exchange(front: Fronted, files: Files) -> None:
    file = front.plan.certificate
    assert "created" in front.process.ask(f"set ssl cert {file} <<\n{B.certificate}{B.key}")
    files.write(B.certificate, B.key)
    front.process.follow_certificate()
    assert shown(front) == B.certificate


def test_a_refusal_of_haproxy_does_not_repeat_what_was_sent(front: Fronted) -> None:
    with pytest.raises(Exception, match="HAProxy refuses `set ssl cert") as caught:
        front.process._said(f"set ssl cert {front.plan.certificate} <<\nx\n\n{B.key}", "Transaction created")
    assert "\n" not in str(caught.value)
    assert_no_line_of(B.key, str(caught.value))


def test_a_process_that_does_not_answer_is_asked_again(
    front: Fronted, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(command: str) -> str:
        raise TimeoutError("timed out")

    files.write(B.certificate, B.key)
    with monkeypatch.context() as patched:
        patched.setattr(front.process, "ask", silent)
        with pytest.raises(TimeoutError):
            front.process.follow_certificate()
    front.process.follow_certificate()
    assert shown(front) == B.certificate


def test_haproxy_is_started_again_with_the_certificate_in_use(front: Fronted, files: Files) -> None:
    files.write("", "")
    with pytest.raises(ConfigError):
        front.process.follow_certificate()
    front.process.kill()
    front.process.start(())
    assert shown(front) == A.certificate


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # by an import of Ray Serve
def test_a_certificate_without_a_front_is_refused(files: Files) -> None:
    """The application of a Serve config file; its port would be left in plain text."""
    from jobs.serving.deployment import app

    front = {"tls_certificate": str(files.certificate), "tls_key": str(files.key)}
    with pytest.raises(ConfigError, match=r"^args\.serving\.front\.tls_certificate: .*args\.listen"):
        app({"checkpoint": "none", "serving": {"front": front}})
