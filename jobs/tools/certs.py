"""`raymoe certs`: creates an authority and certificates for mutual TLS between a job's processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from channels.grpc.tls import CA, CERTIFICATE, KEY, NAME
from errors import ConfigError

CA_KEY = "ca.key"
_EARLY = timedelta(minutes=5)  # clocks differ


@dataclass(frozen=True, slots=True)
class _Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(
    folder: Path, *, days: float, ca_days: float, now: datetime | None = None
) -> dict[str, Any]:
    """Write an authority, unless there is one, and a certificate signed by it, for `channels.grpc.tls`.

    Args:
        folder: The directory to write to.
        days: Days for which the certificate is valid.
        ca_days: Days for which a new authority is valid.
        now: Start of the validity; None is the present time.

    Returns:
        The directory, whether the authority is new, and until when both are valid.

    Raises:
        ConfigError: The directory cannot be written to, or has only one half of an authority.
    """
    now = now or datetime.now(UTC)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = _read_authority(folder)
        authority = known or _authority(now, ca_days)
        left = authority.certificate.not_valid_after_utc - now
        if left <= timedelta():
            raise ConfigError(f"the authority in {folder} has expired; make a new one in an empty directory")
        days = min(days, left / timedelta(days=1))  # a certificate is not valid longer than its authority
        leaf = _leaf(authority, now, days)
        if known is None:
            _write(folder / CA_KEY, _key_pem(authority.key), mode=0o600)
            _write(folder / CA, authority.certificate.public_bytes(serialization.Encoding.PEM))
        # The key first: a process that reads in between finds a pair that does not match, and reads again.
        _write(folder / KEY, _key_pem(leaf.key), mode=0o600)
        _write(folder / CERTIFICATE, leaf.certificate.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise ConfigError(
            f"DIRECTORY: {error.filename or folder} cannot be written ({error.strerror}); give one that is "
            "yours to write to"
        ) from error
    return {
        "directory": str(folder),
        "new_authority": known is None,
        "authority_until": authority.certificate.not_valid_after_utc.isoformat(timespec="seconds"),
        "certificate_until": leaf.certificate.not_valid_after_utc.isoformat(timespec="seconds"),
    }


def _authority(now: datetime, days: float) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{NAME} authority")])
    builder = _builder(name, name, key, now, days)
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _Pair(builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key)


def _leaf(authority: _Pair, now: datetime, days: float) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    builder = _builder(subject, authority.certificate.subject, key, now, days)
    ends = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = (
        builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(ends, critical=False)
    )
    return _Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + timedelta(days=days))
    )


def _read_authority(folder: Path) -> _Pair | None:
    certificate, key = folder / CA, folder / CA_KEY
    if not certificate.exists() and not key.exists():
        return None
    if not (certificate.exists() and key.exists()):
        raise ConfigError(
            f"{folder} has {CA if certificate.exists() else CA_KEY} and not the other half of an authority; "
            "give a directory with both, or an empty one"
        )
    try:
        found = serialization.load_pem_private_key(key.read_bytes(), password=None)
        bundle = x509.load_pem_x509_certificates(certificate.read_bytes())
        theirs = [(one, one.public_key()) for one in bundle]
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{certificate} and {key} hold no authority that can be read ({error}); give an empty directory"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read ({error.strerror}); give an empty directory"
        ) from error
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{key} is no key of an elliptic curve, and no others sign here; give an empty directory, or let "
            "what made it sign"
        )
    # While an authority is being replaced, the file holds both; the key belongs to the one that signs.
    ours = [one for one, public in theirs if public == found.public_key()]
    if ours:
        return _Pair(max(ours, key=lambda one: one.not_valid_after_utc), found)
    raise ConfigError(
        f"{key} is not the key of a certificate in {certificate}; put the authority's own there, or give an "
        "empty directory"
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file atomically, with its mode from the start, so that others can never read a key."""
    making = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    making.rename(path)


__all__ = ["CA_KEY", "make_certificates"]
