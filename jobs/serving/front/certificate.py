"""The certificate of the front's ports: what its PEM files hold, checked, as one text for HAProxy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from errors import ConfigError
from jobs.serving.front_config import FrontConfig
from model.checkpoints.guarded_files import FileGuard

_FILE = FileGuard(size=1 << 20, fix="give a PEM file", error=ConfigError)
_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\s*(.*?)\s*-----END \1-----", re.DOTALL)
_KEYS = ("PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY")


def certificate_text(limits: FrontConfig) -> str | None:
    """The certificate, its chain and its key in PEM, without the comments and blank lines of their files.

    HAProxy gets the text as a command that ends at the first blank line.

    Returns:
        The text; None if the ports have no TLS.

    Raises:
        ConfigError: A file cannot be read, there is no certificate or no key in the files, or these do not
            belong together; in one line that names the field, and nothing of a key.
    """
    named = {
        f"serving.front.{field}": path
        for field, path in (("tls_certificate", limits.tls_certificate), ("tls_key", limits.tls_key))
        if path is not None
    }
    if not named:
        return None
    blocks = [block for field, path in named.items() for block in _blocks(field, path)]
    certificates = [text for label, text in blocks if label == "CERTIFICATE"]
    keys = [text for label, text in blocks if label in _KEYS]
    first, last = next(iter(named.items())), list(named.items())[-1]
    if not certificates:
        raise ConfigError(f"{first[0]}: {first[1]} holds no certificate; give a PEM file with one")
    if not keys:
        locked = any(label == "ENCRYPTED PRIVATE KEY" for label, _ in blocks)
        raise _locked(*last) if locked else _no_key(named)
    _check_pair(named, certificates, keys[-1])
    return "".join((*certificates, keys[-1]))


def _blocks(field: str, path: Path) -> list[tuple[str, str]]:
    """The labels and texts of the blocks of a PEM file; what stands between them is left out."""
    try:
        text = _FILE.read(path).decode("utf-8", "replace")
    except FileNotFoundError:
        raise ConfigError(f"{field}: {path} does not exist; give a PEM file") from None
    except ConfigError as error:
        raise ConfigError(f"{field}: {error}") from None
    found = []
    for label, body in _BLOCK.findall(text):
        if ":" in body:  # fields of a key with a passphrase in the old form
            raise _locked(field, path)
        lines = [line.strip() for line in body.splitlines() if line.strip()]
        found.append((label, "\n".join((f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""))))
    return found


def _no_key(named: Mapping[str, Path]) -> ConfigError:
    files = " and ".join(map(str, named.values()))
    return ConfigError(
        f"serving.front.tls_key: {files} {'holds' if len(named) == 1 else 'hold'} no private key; give the "
        "PEM file with the certificate's key"
    )


def _locked(field: str, path: Path) -> ConfigError:
    return ConfigError(
        f"{field}: the private key in {path} has a passphrase, which nobody can type there; remove it "
        "(openssl pkey -in FILE -out NEW)"
    )


def _check_pair(named: Mapping[str, Path], certificates: list[str], key: str) -> None:
    """Check that all blocks can be read, and that the key is that of the first certificate.

    Raises:
        ConfigError: They cannot be used.
    """
    field, path = next(iter(named.items()))
    try:
        own, *_ = [x509.load_pem_x509_certificate(text.encode()) for text in certificates]
        certified = own.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{field}: a certificate in {path} is damaged; copy the file again") from None
    field_of_key, path_of_key = list(named.items())[-1]
    try:
        held = load_pem_private_key(key.encode(), None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{field_of_key}: the private key in {path_of_key} cannot be read; copy the file again"
        ) from None
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if held.public_bytes(*form) != certified.public_bytes(*form):
        raise ConfigError(
            f"{field_of_key}: the private key in {path_of_key} is not that of the first certificate in "
            f"{path}; give the key of the server's certificate, which stands before its chain"
        )


__all__ = ["certificate_text"]
