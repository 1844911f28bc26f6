"""The environment switches: defaults, valid values, and errors that list them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sparsedsl.errors import SettingsError
from sparsedsl.settings import Settings, memory_bytes, settings, stage, tune_mode


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("SPARSEDSL_CACHE", "SPARSEDSL_DEBUG", "SPARSEDSL_MEMORY_BYTES", "SPARSEDSL_TUNE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_defaults():
    assert settings() == Settings(cache=Path.home() / ".cache" / "sparsedsl", debug=False, memory_bytes=2**28, tune="cached")


def test_an_empty_switch_is_an_unset_one(monkeypatch):
    monkeypatch.setenv("SPARSEDSL_CACHE", "")
    monkeypatch.setenv("SPARSEDSL_DEBUG", "")
    monkeypatch.setenv("SPARSEDSL_MEMORY_BYTES", "")
    monkeypatch.setenv("SPARSEDSL_TUNE", "")
    assert settings() == Settings(cache=Path.home() / ".cache" / "sparsedsl", debug=False, memory_bytes=2**28, tune="cached")


def test_the_users_cache_folder_is_respected(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings().cache == tmp_path / "sparsedsl"
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "not" / "there" / "yet"))
    assert settings().cache == tmp_path / "not" / "there" / "yet"
    assert not settings().cache.exists()


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("SPARSEDSL_CACHE", "~/kernels")
    assert settings().cache == Path.home() / "kernels"


@pytest.mark.parametrize("value", ["2", "yes", "true", " 1"])
def test_debug_is_0_or_1(monkeypatch, value):
    monkeypatch.setenv("SPARSEDSL_DEBUG", value)
    with pytest.raises(SettingsError) as caught:
        settings()
    assert str(caught.value) == f"SPARSEDSL_DEBUG={value!r} is not valid; valid values: 0, 1 (or leave it unset)"


@pytest.mark.parametrize(("value", "count"), [("0", 0), ("1", 1), ("17179869184", 2**34)])
def test_memory_is_a_number_of_bytes(monkeypatch, value, count):
    monkeypatch.setenv("SPARSEDSL_MEMORY_BYTES", value)
    assert settings().memory_bytes == memory_bytes() == count


@pytest.mark.parametrize("value", ["-1", "1e9", "256 MiB", "1_000", "half", "\u0663"])
def test_other_values_of_memory_are_refused(monkeypatch, value):
    monkeypatch.setenv("SPARSEDSL_MEMORY_BYTES", value)
    for read in (settings, memory_bytes):
        with pytest.raises(SettingsError) as caught:
            read()
        assert str(caught.value) == (
            f"SPARSEDSL_MEMORY_BYTES={value!r} is not valid; valid values: a number of bytes (or leave it unset)"
        )


@pytest.mark.parametrize("value", ["cached", "off", "full"])
def test_tune_is_one_of_three(monkeypatch, value):
    monkeypatch.setenv("SPARSEDSL_TUNE", value)
    assert settings().tune == tune_mode() == value


@pytest.mark.parametrize("value", ["0", "OFF", "never"])
def test_other_values_of_tune_are_refused(monkeypatch, value):
    monkeypatch.setenv("SPARSEDSL_TUNE", value)
    wanted = f"SPARSEDSL_TUNE={value!r} is not valid; valid values: cached, off, full (or leave it unset)"
    for read in (settings, tune_mode):
        with pytest.raises(SettingsError) as caught:
            read()
        assert str(caught.value) == wanted


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home folder, as in some containers."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])


def test_without_a_home_folder_the_cache_is_a_place_where_nothing_can_be_kept(homeless):
    with pytest.raises(NotADirectoryError):
        settings().cache.mkdir(parents=True)


def test_without_a_home_folder_a_tilde_is_refused(homeless, monkeypatch):
    monkeypatch.setenv("SPARSEDSL_CACHE", "~/kernels")
    with pytest.raises(SettingsError, match="SPARSEDSL_CACHE='~/kernels' is not valid"):
        settings()


def test_a_folder_that_may_not_be_looked_at_is_for_the_writer_to_report(monkeypatch, tmp_path):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "closed" / "below"))
    monkeypatch.setattr("os.stat", forbidden)
    assert settings().cache == tmp_path / "closed" / "below"


@pytest.mark.parametrize("value", ["here/below", __file__])
def test_the_cache_is_an_absolute_folder(monkeypatch, value):
    monkeypatch.setenv("SPARSEDSL_CACHE", value)
    with pytest.raises(SettingsError, match="valid values: the absolute path of a folder"):
        settings()


def test_stage_logs_only_when_asked(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="sparsedsl")
    with stage("analyse"):
        pass
    assert caplog.messages == []
    monkeypatch.setenv("SPARSEDSL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError), stage("emit"):
        _ = 1 / 0
    assert [message.split(":")[0] for message in caplog.messages] == ["emit"]
