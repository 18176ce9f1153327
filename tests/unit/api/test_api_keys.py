"""API keys: where they come from, what is refused without showing it, and a file that is replaced."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError
from jobs.api.api_keys import POLL_SECONDS, ApiKeys, client_key, taken_from
from jobs.serving.config import ServeConfig

KEY, OTHER = "0123456789abcdef-first", "0123456789abcdef-second"
SHORT, SPACED, FOREIGN = "secret-word", "two secret-words-here", "schl\u00fcssel-geheim-lang"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Followed:
    """Keys of a file, with a clock that is turned by hand and the lines that they tell."""

    def __init__(self, file: Path, *fixed: str) -> None:
        self.now, self.told = 0.0, list[str]()
        self.keys = ApiKeys(fixed, file, tell=self.told.append, clock=lambda: self.now)

    def later(self) -> frozenset[str]:
        self.now += POLL_SECONDS
        return self.keys.digests()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# for the web site\n\n  {KEY}\r\n")
    path.chmod(0o600)
    return path


def test_a_key_is_compared_by_its_digest_and_the_scheme_in_any_case(file: Path) -> None:
    keys = ApiKeys([OTHER, f"sha256:{digest('not in a file, nor sent')}"], file)
    assert keys.digests() == {digest(KEY), digest(OTHER), digest("not in a file, nor sent")}
    for good in (f"Bearer {KEY}", f"bearer {OTHER}", f" BEARER   {KEY} "):
        assert keys.allows(good)
    wrong = [None, "", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {digest(KEY)}"]
    assert not any(map(keys.allows, [*wrong, f"Bearer {KEY} {OTHER}", f"Bearer sha256:{digest(KEY)}"]))
    assert ApiKeys().allows(None) and not ApiKeys().needed and keys.needed
    assert KEY not in repr(keys) and OTHER not in repr(keys)


def test_a_file_is_followed_without_a_restart(file: Path) -> None:
    followed = Followed(file, OTHER)
    assert followed.keys.digests() == {digest(KEY), digest(OTHER)}
    file.write_text(f"{KEY}-new\n")
    assert followed.keys.digests() == {digest(KEY), digest(OTHER)}  # not at every request
    assert followed.later() == {digest(f"{KEY}-new"), digest(OTHER)}
    assert followed.keys.allows(f"Bearer {KEY}-new") and not followed.keys.allows(f"Bearer {KEY}")
    assert len(followed.told) == 1 and KEY not in followed.told[0]


@pytest.mark.parametrize("digits", ["", "abcd", "0" * 63, "0" * 65, "g" * 64])
@pytest.mark.parametrize("prefix", ["sha256:", "SHA256:"])
def test_a_digest_that_was_miscopied_is_no_key(file: Path, prefix: str, digits: str) -> None:
    """It may be public, so that everybody could send it."""
    file.write_text(f"{prefix}{digits}\n")
    for keys in (lambda: ApiKeys([f"{prefix}{digits}"]), lambda: ApiKeys([], file)):
        with pytest.raises(ConfigError, match="begins with sha256: and is no digest of a key; write 64 hex"):
            keys()


def absent(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_text("# nothing\n")


def invalid(file: Path) -> None:
    file.write_text(f"{OTHER}\n{SPACED}\n")


def a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def enormous(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(1 << 40)


@pytest.mark.parametrize("spoil", [absent, empty, invalid, a_fifo, enormous])
def test_a_file_that_is_spoilt_keeps_the_last_keys_and_says_so_once(
    file: Path, spoil: Callable[[Path], None]
) -> None:
    followed = Followed(file)
    spoil(file)
    for _ in range(5):
        assert followed.later() == {digest(KEY)}
    assert len(followed.told) == 1, followed.told
    assert str(file) in followed.told[0] and "stay valid" in followed.told[0]
    file.unlink(missing_ok=True)
    file.write_text(OTHER)
    assert followed.later() == {digest(OTHER)}
    assert len(followed.told) == 2 and "read again" in followed.told[1]
    assert not any(secret in line for line in followed.told for secret in (KEY, OTHER, *SPACED.split()))


def test_each_fault_is_told_once_without_notes_on_keys_that_are_not_used(file: Path) -> None:
    followed = Followed(file)
    file.write_text(f"{SHORT}\n{SPACED}\n")
    for _ in range(4):
        followed.later()
    file.unlink()
    for _ in range(4):
        followed.later()
    file.write_text(f"{SHORT}\n")
    for _ in range(4):
        followed.later()
    first, second, short, end = followed.told
    assert "line 2" in first and "white space" in first
    assert "No such file" in second
    assert "11 characters" in short and "read again" in end


@pytest.mark.parametrize("spoil", [absent, empty, invalid, a_fifo, enormous])
def test_at_the_start_such_a_file_is_refused_in_one_line(file: Path, spoil: Callable[[Path], None]) -> None:
    spoil(file)
    with pytest.raises(ConfigError) as caught:
        ApiKeys((), file)
    text = str(caught.value)
    assert str(file) in text and "\n" not in text
    assert not any(secret in text for secret in (KEY, OTHER, *SPACED.split()))


def test_a_file_for_everybodys_eyes_is_told(file: Path) -> None:
    assert Followed(file).told == []
    file.chmod(0o644)
    (line,) = Followed(file).told
    assert "chmod 600" in line


def mounted(folder: Path, version: str, **keys: str) -> None:
    """Write a secret as the kubelet does: files in a directory of a version, `..data`, and links."""
    inner = folder / f"..{version}"
    inner.mkdir(parents=True)
    for name, key in keys.items():
        (inner / name).write_text(key)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..new").symlink_to(f"..{version}")
    (folder / "..new").rename(folder / "..data")
    for link in folder.iterdir():
        if not link.name.startswith("..") and not link.exists():
            link.unlink()


def test_a_mounted_secret_is_a_directory_whose_links_are_swapped(tmp_path: Path) -> None:
    folder = tmp_path / "secret"
    mounted(folder, "1", web=KEY, batch=f"{OTHER}\n")
    followed = Followed(folder)
    assert followed.keys.digests() == {digest(KEY), digest(OTHER)}
    mounted(folder, "2", web=f"{KEY}-2", night=OTHER)
    assert followed.later() == {digest(f"{KEY}-2"), digest(OTHER)}
    assert Followed(folder / "web").keys.digests() == {digest(f"{KEY}-2")}  # a link is a file, too
    assert Followed(folder / "web").told == []  # its mode is the mount's


@pytest.mark.parametrize("key", [SPACED, FOREIGN, "", "new\nline-in-a-long-key", "nul\0in-a-long-long-key"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_dict({"serving": {"api_keys": [OTHER, key]}})
    text = str(caught.value)
    assert text.startswith("serving.api_keys: entry 2 is") and "\n" not in text
    assert OTHER not in text and not any(part in text for part in key.split() if len(part) > 3)


@pytest.mark.parametrize("value", ["a-string-of-a-key", {"name": "a-string-of-a-key"}, ["x" * 20, 5], 7])
def test_what_is_no_list_of_keys_is_refused_without_showing_it(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.from_dict({"serving": {"api_keys": value}})
    text = str(caught.value)
    assert text.startswith("serving.api_keys: ") and "\n" not in text
    assert "a-string-of-a-key" not in text and "x" * 20 not in text


def test_a_short_key_is_told_without_showing_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = ServeConfig.from_dict({"serving": {"api_keys": [SHORT]}})
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "11 characters" in told and SHORT not in told
    ServeConfig.from_dict(config.to_dict())
    assert capsys.readouterr().err == ""  # other processes have the digest


def test_a_configuration_holds_digests_in_place_of_keys(file: Path) -> None:
    config = ServeConfig.from_dict({"serving": {"api_keys": [KEY, KEY], "api_keys_file": str(file)}})
    assert config.serving.api_keys == (f"sha256:{digest(KEY)}",)
    for shown in (repr(config), str(config), str(config.to_dict()), config.model_dump_json()):
        assert KEY not in shown
    again = ServeConfig.from_dict(config.to_dict())
    assert again == config
    assert again.serving.allowed_keys().digests() == {digest(KEY)}


def test_a_path_of_a_configuration_does_not_depend_on_the_working_directory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    config = ServeConfig.from_dict({"serving": {"api_keys_file": file.name}})
    assert config.serving.api_keys_file == str(file)


def test_keys_of_the_environment_are_taken_out_of_it(file: Path) -> None:
    environment = {"RAYMOE_API_KEY": f"{KEY}\n{OTHER} ", "RAYMOE_API_KEYS_FILE": str(file), "HOME": "/"}
    config = ServeConfig().with_keys_of(environment)
    assert environment == {"RAYMOE_API_KEYS_FILE": str(file), "HOME": "/"}
    assert config.serving.api_keys == (f"sha256:{digest(KEY)}", f"sha256:{digest(OTHER)}")
    assert config.serving.api_keys_file == str(file)
    own = ServeConfig.from_dict({"serving": {"api_keys_file": "/etc/keys"}}).with_keys_of(environment)
    assert own.serving.api_keys_file == "/etc/keys"  # the configuration goes before the environment
    keys = ApiKeys.of((), None, {"RAYMOE_API_KEY": OTHER, "RAYMOE_API_KEYS_FILE": str(file)})
    assert keys.digests() == {digest(KEY), digest(OTHER)}  # as in a pod


@pytest.mark.parametrize("variable", ["RAYMOE_API_KEY", "RAYMOE_API_KEYS_FILE"])
def test_a_variable_that_is_set_and_empty_does_not_open_the_server(variable: str) -> None:
    for use in (lambda: taken_from({variable: " "}), lambda: ApiKeys.of((), None, {variable: ""})):
        with pytest.raises(ConfigError, match=f"{variable} is set and empty"):
            use()


@pytest.mark.parametrize("override", [f"serving.api_keys=[{KEY}]", f"serving={{api_keys: [{KEY}]}}"])
def test_a_key_in_an_argument_is_refused_and_its_digest_is_not(override: str) -> None:
    with pytest.raises(ConfigError, match="RAYMOE_API_KEY") as caught:
        ServeConfig.load(None, [override])
    assert KEY not in str(caught.value)
    allowed = ServeConfig.load(None, [override.replace(KEY, f"sha256:{digest(KEY)}")])
    assert allowed.serving.allowed_keys().allows(f"Bearer {KEY}")


def test_a_key_in_a_serve_config_file_is_refused_since_the_dashboard_shows_it() -> None:
    with pytest.raises(ConfigError, match="dashboard") as caught:
        ServeConfig.of_arguments({"serving": {"api_keys": [KEY]}})
    assert KEY not in str(caught.value)
    digests = {"serving": {"api_keys": [f"sha256:{digest(KEY)}"]}}
    assert ServeConfig.of_arguments(digests).serving.allowed_keys().allows(f"Bearer {KEY}")


def test_a_client_takes_its_key_from_a_file_or_the_environment(file: Path) -> None:
    assert client_key(None, {}) is None
    assert client_key(None, {"RAYMOE_API_KEY": f"{OTHER} {KEY}"}) == OTHER
    assert client_key(None, {"RAYMOE_API_KEYS_FILE": str(file)}) == KEY
    assert client_key(file, {"RAYMOE_API_KEY": OTHER}) == KEY
    file.write_text(f"sha256:{digest(KEY)}")
    with pytest.raises(ConfigError, match="digest"):
        client_key(file, {})
