"""API keys of a served model: where they come from, their digests, and the file that is followed."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final

from errors import ConfigError
from jobs.console import say

VARIABLE: Final = "RAYMOE_API_KEY"
"""Environment variable with one key, or several with white space between them; clients send the first."""
FILE_VARIABLE: Final = "RAYMOE_API_KEYS_FILE"
"""Environment variable with the path of a file or directory of keys."""
SHORTEST: Final = 16
"""Characters of a key that cannot be found by trying; a shorter one is accepted with a warning."""
POLL_SECONDS: Final = 1.0
"""Time between two looks at the file."""
_MAX_BYTES = 1 << 20
_MAX_FILES = 1000
_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(_DIGEST_PREFIX + r"([0-9a-fA-F]{64})")

Tell = Callable[[str], None]
"""Is given one line; never a key."""


def digest_of(key: str, where: str, tell: Tell = say) -> str:
    """The SHA-256 of a key in lower-case hexadecimal digits.

    Args:
        key: A key, or `sha256:` and its digest.
        where: What holds the key, for messages.
        tell: Is told of a key that can be found by trying.

    Raises:
        ConfigError: No client can send it: it is empty, or not of printable ASCII characters alone. Or it is
            a digest that was miscopied, which would be a key that is no secret.
    """
    given = _DIGEST.fullmatch(key)
    if given is not None:
        return given[1].lower()
    if not key:
        raise ConfigError(f"{where} is an empty key; remove it, or write a key")
    if key.lower().startswith(_DIGEST_PREFIX):
        raise ConfigError(
            f"{where} begins with {_DIGEST_PREFIX} and is no digest of a key; write 64 hexadecimal digits "
            "behind it"
        )
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"{where} is a key with white space or a character that is not ASCII, which clients cannot "
            "send; write letters, digits and punctuation alone, a line for each key"
        )
    if len(key) < SHORTEST:
        tell(
            f"{where} is a key of {len(key)} characters, which can be found by trying; use {SHORTEST} or "
            "more (openssl rand -hex 32)"
        )
    return hashlib.sha256(key.encode()).hexdigest()


def configured_digests(values: Any, tell: Tell = say) -> tuple[str, ...]:
    """The keys of a configuration as `sha256:` and digest, so that no process holds or shows a key itself.

    Args:
        values: A list of keys or digests; null is none.
        tell: Is told of a key that can be found by trying.

    Raises:
        ValueError: It is no list of keys; the message does not hold the value.
    """
    if values is None:
        return ()
    if not isinstance(values, list | tuple):
        raise ValueError("this is not a list; write [KEY, …]")
    found: dict[str, None] = {}
    for index, key in enumerate(values):
        where = f"entry {index + 1}"
        if not isinstance(key, str):
            raise ValueError(f"{where} is not a text; write the key in quotes")
        try:
            found[f"sha256:{digest_of(key, where, tell)}"] = None
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return tuple(found)


def is_digest(key: Any) -> bool:
    """Whether an entry of a list of keys is the digest of a key and not a key."""
    return isinstance(key, str) and _DIGEST.fullmatch(key) is not None


class ApiKeys:
    """The keys that a request may carry: fixed ones, and those of a file that is followed; for one thread.

    The file is read again every `POLL_SECONDS`, when a key is asked for. While it is missing, empty or
    invalid, the keys that were read from it before stay valid.

    Args:
        fixed: Keys, or `sha256:` and their digests.
        file: A file with a key on each line, with blank lines and comments (`#`), or a directory of such
            files, as Kubernetes mounts a secret; names that begin with a dot are left out.
        tell: Is given a line about a change or a fault of the file.
        clock: Seconds, monotonic.

    Raises:
        ConfigError: A key cannot be sent, or the file holds none or cannot be read.
    """

    def __init__(
        self,
        fixed: Iterable[str] = (),
        file: Path | None = None,
        *,
        tell: Tell = say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._tell, self._clock = file, tell, clock
        self._fixed = frozenset(digest_of(key, "an API key", tell) for key in fixed)
        self._digests = self._fixed
        self._seen: bytes | None = None  # digest of what the file held, and not what it held
        self._failures = 0
        self._fault = ""  # that has been told
        self._next = clock() + POLL_SECONDS
        if file is not None:
            self._take(_contents(file))
            _note_mode(file, tell)

    @classmethod
    def of(
        cls,
        fixed: Iterable[str],
        file: Path | None,
        environment: Mapping[str, str] = os.environ,
        *,
        tell: Tell = say,
    ) -> ApiKeys:
        """The keys of a configuration and of the environment; its file goes before that of the environment.

        Raises:
            ConfigError: As for the class, or a variable is set and empty.
        """
        return cls((*fixed, *keys_of(environment)), file or file_of(environment), tell=tell)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._digests)} keys, file={str(self._file)!r})"

    @property
    def needed(self) -> bool:
        """Whether a request must carry a key."""
        return bool(self._digests) or self._file is not None

    def digests(self) -> frozenset[str]:
        """SHA-256 digests of the keys that are valid now, in lower-case hexadecimal digits."""
        if self._file is not None and self._clock() >= self._next:
            self._next = self._clock() + POLL_SECONDS
            self._look(self._file)
        return self._digests

    def allows(self, authorization: str | None) -> bool:
        """Whether a request may be answered.

        Args:
            authorization: `Bearer KEY`, from an HTTP header or gRPC metadata; the scheme in any case.
        """
        if not self.needed:
            return True
        scheme, _, key = (authorization or "").strip().partition(" ")
        # Headers are read as Latin-1, whatever bytes the client sent.
        given = hashlib.sha256(key.strip().encode("latin-1", "replace")).hexdigest()
        known = False
        for digest in self.digests():  # all of them, so that the time tells nothing
            known |= hmac.compare_digest(given, digest)
        return known and scheme.lower() == "bearer"

    def _look(self, file: Path) -> None:
        try:
            changed = self._take(_contents(file))
        except ConfigError as error:
            self._failures += 1
            if self._failures > 1 and str(error) != self._fault:  # once, the file may just be in replacement
                self._fault = str(error)
                self._tell(f"{self._fault}; the API keys that it held before stay valid")
            return
        if changed or self._fault:
            self._tell(f"API keys were read again from {file}; {len(self._digests)} are valid")
        self._failures, self._fault = 0, ""

    def _take(self, contents: list[tuple[Path, bytes]]) -> bool:
        """Use the keys of files; whether they have changed."""
        assert self._file is not None
        seen = hashlib.sha256(repr(contents).encode()).digest()
        if seen == self._seen:
            return False
        notes: list[str] = []  # of keys that are used, and not at every look at a file that has a fault
        found = frozenset(
            digest_of(key, where, notes.append)
            for path, data in contents
            for where, key in _lines(path, data)
        )
        if not found:
            raise ConfigError(f"{self._file} holds no API key; write one on each line")
        self._digests, self._seen = self._fixed | found, seen
        for note in notes:
            self._tell(note)
        return True


def keys_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in `RAYMOE_API_KEY`.

    Raises:
        ConfigError: It is set and empty, as when a secret is missing; a server without keys must be meant.
    """
    text = environment.get(VARIABLE)
    if text is None:
        return ()
    if not text.split():
        raise ConfigError(f"{VARIABLE} is set and empty; put a key into it, or unset it")
    return tuple(text.split())


def file_of(environment: Mapping[str, str]) -> Path | None:
    """The path in `RAYMOE_API_KEYS_FILE`.

    Raises:
        ConfigError: It is set and empty.
    """
    path = environment.get(FILE_VARIABLE)
    if path is None:
        return None
    if not path.strip():
        raise ConfigError(f"{FILE_VARIABLE} is set and empty; put a path into it, or unset it")
    return Path(path).expanduser().absolute()


def taken_from(environment: MutableMapping[str, str]) -> tuple[tuple[str, ...], Path | None]:
    """Keys, as `sha256:` and digest, and file of an environment; no process that starts later gets the keys.

    Raises:
        ConfigError: A variable is set and empty, or holds what is no key.
    """
    keys, file = keys_of(environment), file_of(environment)
    digests = tuple(f"sha256:{digest_of(key, VARIABLE)}" for key in keys)
    environment.pop(VARIABLE, None)
    return digests, file


def client_key(file: Path | None = None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that a client sends: the first of a file, else of the environment; None without any.

    Raises:
        ConfigError: The file holds no key or cannot be read, or a variable is set and empty.
    """
    if file is None:
        for key in keys_of(environment):
            return key
        file = file_of(environment)
        if file is None:
            return None
    for path, data in _contents(file):
        for where, key in _lines(path, data):
            if is_digest(key):
                raise ConfigError(f"{where} is the digest of a key; a client needs the key itself")
            digest_of(key, where)
            return key
    raise ConfigError(f"{file} holds no API key; write one on each line")


def _lines(path: Path, data: bytes) -> Iterator[tuple[str, str]]:
    """The keys of a file, each with its place for messages."""
    for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{path}, line {number},", text


def _contents(path: Path) -> list[tuple[Path, bytes]]:
    """What a file, or the files of a directory, hold.

    Raises:
        ConfigError: It cannot be read, is no file, or is too large to be a list of keys.
    """
    try:
        if not path.is_dir():
            return [(path, _read(path))]
        # Links of a mounted secret lead through `..data`, which the kubelet replaces at once.
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        if len(names) > _MAX_FILES:
            raise ConfigError(f"{path} holds {len(names)} files, and {_MAX_FILES} keys at most are read")
        return [(path / name, _read(path / name)) for name in names]
    except OSError as error:
        raise ConfigError(f"the API keys of {path} cannot be read: {error.strerror or error}") from None


def _read(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(f"{path} is no file; give a file with an API key on each line")
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"{path} has more than {_MAX_BYTES} bytes; give a file with an API key on each line"
        )
    return data


def _note_mode(path: Path, tell: Tell) -> None:
    """Tell of a file that all users of the machine can read; a mounted secret is its container's alone."""
    real = path.resolve()
    mounted = any(part.startswith("..") for part in real.parts)
    if real.is_file() and not mounted and real.stat().st_mode & stat.S_IROTH:
        tell(f"{path} can be read by every user of this machine; chmod 600 it")


__all__ = [
    "FILE_VARIABLE",
    "POLL_SECONDS",
    "SHORTEST",
    "VARIABLE",
    "ApiKeys",
    "client_key",
    "configured_digests",
    "digest_of",
    "file_of",
    "is_digest",
    "keys_of",
    "taken_from",
]
