"""What is kept of the kernels' proofs: the key, the file, the lock."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
import torch

from fusedloss.core import environment
from fusedloss.trust import verdicts
from fusedloss.trust.verdicts import FAILED, PROVED, UNKNOWN, Kept, Verdict

CPU = torch.device("cpu")
GOOD, BAD = Verdict(PROVED, 7, 0.25, 0.5), Verdict(FAILED, 3, 0.5, float("inf"), "257 x 391: NaN")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(verdicts, "_ignored", set())
    verdicts.key.cache_clear()
    yield tmp_path / "kept"
    verdicts.key.cache_clear()


def written(folder: Path) -> Path:
    assert verdicts.keep(CPU, {"triton stats fp32": GOOD, "triton grad fp32": BAD}) == ""
    (file,) = folder.iterdir()
    return file


def test_what_is_kept_is_read(folder):
    assert verdicts.read(CPU) == Kept({}, [])
    file = written(folder)
    assert file == verdicts.path(CPU)
    assert verdicts.read(CPU).verdicts == {"triton stats fp32": GOOD, "triton grad fp32": BAD}
    content = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"no JSON: {word}"))
    assert set(content) == {"schema", "key", "verdicts", "races"} and content["schema"] == 1


def test_what_is_kept_is_added_to(folder):
    written(folder)
    race = {"kind": "one direction", "dtype": "bf16", "N": 64, "D": 8, "backend": "triton", "seconds": {"triton": 1.0}}
    verdicts.keep(CPU, {}, [race])
    verdicts.keep(CPU, {"triton grad fp32": GOOD, "triton exp fp32": Verdict(UNKNOWN)})
    assert verdicts.read(CPU) == Kept({"triton stats fp32": GOOD, "triton grad fp32": GOOD}, [race])
    assert len(list(folder.iterdir())) == 1  # nothing is left of what was replaced


@pytest.mark.parametrize(
    "content, why",
    [
        ("", "Expecting value"),
        (None, "Expecting|Unterminated|delimiter"),  # truncated
        ("[" * 100000, "recursion|Stack overflow"),  # as Python 3.14 says it
        ('{"schema": 2}', "not of schema 1"),
        ("[1, 2]", "not of schema 1"),
        ('{"schema": 1, "key": {"device": "another"}}', "of another device or version"),
        (b"\xff\xfe\x00", "codec|decode"),
    ],
    ids=["empty", "truncated", "deep", "schema", "list", "key", "bytes"],
)
def test_a_file_that_is_not_understood_is_ignored_with_one_line(content, why, folder, caplog):
    file = written(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else os.fsencode(content))
    for _ in range(2):
        assert verdicts.read(CPU) == Kept({}, [])
    (line,) = caplog.messages
    assert str(file) in line and caplog.records[0].levelname == "WARNING"
    assert re.search(why, line)
    assert verdicts.keep(CPU, {"triton exp fp32": GOOD}) == ""  # and replaced by what is found anew
    assert verdicts.read(CPU).verdicts == {"triton exp fp32": GOOD}


@pytest.mark.parametrize(
    "change",
    [{"state": "good"}, {"cases": "7"}, {"worst": "0.5"}, {"reason": None}, {"state": UNKNOWN}],
    ids=lambda change: " ".join(f"{name}={value}" for name, value in change.items()),
)
def test_a_verdict_of_another_form_is_none(change, folder, caplog):
    file = written(folder)
    content = json.loads(file.read_text())
    content["verdicts"]["triton stats fp32"] |= change
    file.write_text(json.dumps(content))
    assert verdicts.read(CPU) == Kept({}, []) and len(caplog.messages) == 1


def test_another_user_s_file_is_ignored(folder, caplog, monkeypatch):
    written(folder)
    monkeypatch.setattr(verdicts.os, "getuid", lambda: 1234)
    monkeypatch.setattr(verdicts.os, "fstat", lambda handle: os.stat_result([0] * 4 + [4321] + [0] * 5))
    assert verdicts.read(CPU) == Kept({}, [])
    assert "they belong to another user (4321)" in caplog.messages[0]
    for owner in (0, 1234):  # root, and this one
        monkeypatch.setattr(
            verdicts.os, "fstat", lambda handle, owner=owner: os.stat_result([0] * 4 + [owner] + [0] * 5)
        )
        assert len(verdicts.read(CPU).verdicts) == 2


def test_where_nothing_can_be_written_that_is_said(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verdicts.os, "replace", full)
    assert verdicts.keep(CPU, {"triton stats fp32": GOOD}) == "No space left on device"
    assert list(folder.iterdir()) == []
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "/proc/fusedloss")
    assert verdicts.keep(CPU, {"triton stats fp32": GOOD}) and verdicts.read(CPU) == Kept({}, [])
    with verdicts.locked(CPU, 0, lambda: False) as held:
        assert held  # each process is on its own


@pytest.mark.parametrize("fcntl", [verdicts.fcntl, None], ids=["fcntl", "without"])
def test_one_holds_the_lock(fcntl, folder, monkeypatch):
    monkeypatch.setattr(verdicts, "fcntl", fcntl)
    asked = []
    with verdicts.locked(CPU, 60, lambda: False) as held:
        assert held
        with verdicts.locked(CPU, 0, lambda: False) as second:
            assert not second
        with verdicts.locked(CPU, 60, lambda: asked.append(1) or len(asked) > 2) as third:  # its verdict comes
            assert not third and len(asked) == 3
    with verdicts.locked(CPU, 0, lambda: False) as held:
        assert held
    with pytest.raises(KeyboardInterrupt), verdicts.locked(CPU, 0, lambda: False):
        raise KeyboardInterrupt
    with verdicts.locked(CPU, 0, lambda: False) as held:
        assert held


def test_without_fcntl_a_lock_of_a_process_that_is_gone_ends(folder, monkeypatch):
    monkeypatch.setattr(verdicts, "fcntl", None)
    folder.mkdir()
    left = verdicts.path(CPU).with_suffix(".held")
    left.touch()
    with verdicts.locked(CPU, 0, lambda: False) as held:
        assert not held
    os.utime(left, (0, 0))
    with verdicts.locked(CPU, 0, lambda: False) as held:
        assert held
    assert not left.exists()


def test_a_lock_follows_no_link(folder, tmp_path):
    folder.mkdir()
    other = tmp_path / "precious"
    verdicts.path(CPU).with_suffix(".lock").symlink_to(other)
    with verdicts.locked(CPU, 0, lambda: False) as held:
        assert held
    assert not other.exists()


def test_the_file_is_nobody_else_s_to_write(folder):
    assert stat.S_IMODE(written(folder).stat().st_mode) == 0o644


# The key --------------------------------------------------------------------------------------------------------------


def test_the_key_names_what_a_verdict_hangs_on():
    key = verdicts.key(CPU)
    assert key["torch"] == torch.__version__ and key["device"] and key["fusedloss"]
    names = ("device", "capability", "multiprocessors", "driver", "runtime", "torch", "triton", "fusedloss")
    assert set(key) == {*names, "sources", "extension"}
    json.dumps(key)


def test_the_sources_are_the_kernels_their_launchers_and_the_cases():
    named = {f"{file.parent.name}/{file.name}" for file in verdicts.sources()}
    kernels = {f"kernels/{file.name}" for file in Path(__file__).parents[2].glob("kernels/*.py")}
    launchers = {"triton/rows.py", "triton/lists.py", "cuda/__init__.py", "cuda/rows.py", "backends/shared.py"}
    assert len(kernels) > 5 and kernels | launchers | {"proof/cases.py", "triton/measured.json"} <= named


@pytest.mark.parametrize("which", ["sources", "extension"])
def test_a_changed_source_is_another_key(which, tmp_path, monkeypatch, folder):
    source = tmp_path / "kernel.py"
    source.write_text("a")
    monkeypatch.setattr(verdicts, which, lambda: [source])
    verdicts.key.cache_clear()
    written(folder)
    source.write_text("b")
    verdicts.key.cache_clear()
    assert verdicts.read(CPU) == Kept({}, [])
    source.write_text("a")
    verdicts.key.cache_clear()
    assert len(verdicts.read(CPU).verdicts) == 2


def test_the_digest_is_of_contents(tmp_path):
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for file in files:
        file.write_text("x")
    before = verdicts.digest(files)
    os.utime(files[0], (0, 0))
    assert verdicts.digest(files) == before != verdicts.digest(files[:1])
    files[0].write_text("xx")
    assert verdicts.digest(files) != before


# Variables ------------------------------------------------------------------------------------------------------------


def test_where_verdicts_are_kept(monkeypatch, tmp_path):
    assert environment.cache_dir() == tmp_path / "kept"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", "~/there")
    assert environment.cache_dir() == tmp_path / "there"
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", " ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert environment.cache_dir() == tmp_path / "xdg" / "fusedloss"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert environment.cache_dir() == tmp_path / ".cache" / "fusedloss"
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FUSEDLOSS_CACHE_DIR", str(file))
    with pytest.raises(ValueError, match=r"FUSEDLOSS_CACHE_DIR must be a folder, got the file .*; name a folder, or"):
        environment.cache_dir()


def test_when_kernels_are_proved(monkeypatch):
    monkeypatch.delenv("FUSEDLOSS_VERIFY", raising=False)
    assert environment.verify() == "first"
    for value, mode in (("", "first"), (" OFF ", "off"), ("inline", "inline"), ("Trust", "trust"), ("first", "first")):
        monkeypatch.setenv("FUSEDLOSS_VERIFY", value)
        assert environment.verify() == mode
    monkeypatch.setenv("FUSEDLOSS_VERIFY", "1")
    with pytest.raises(
        ValueError, match="FUSEDLOSS_VERIFY must be first, off, inline, trust, got '1'; set one, or unset"
    ):
        environment.verify()
