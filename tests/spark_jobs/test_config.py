"""Settings: what is refused and how, what is taken, and where everything lies."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spark_jobs.config import Settings, load_settings
from spark_jobs.errors import ConfigurationError

REFUSED: list[dict[str, str]] = json.loads(
    (Path(__file__).resolve().parents[1] / "cases" / "settings" / "refused.json").read_text("utf-8")
)["cases"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_a_wrong_setting_is_refused_on_one_line(monkeypatch: pytest.MonkeyPatch, case: dict[str, str]) -> None:
    monkeypatch.setenv(case["variable"], case["value"])
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    message = str(refused.value)
    assert message.startswith(f"wrong settings: {case['variable']}: ")
    assert case["says"] in message
    assert "\n" not in message
    assert "correct the environment variable" in message
    assert refused.value.exit_code == 2


def test_every_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"ADTALLY_DRIVER_MEMORY": "lots", "ADTALLY_SPLIT_BYTES": "0", "ADTALLY_HOUR_GRACE": "-PT1S"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings(shuffle_partitions=-1)
    message = str(refused.value)
    assert [message.count(f"{name}: ") for name in (*wrong, "ADTALLY_SHUFFLE_PARTITIONS")] == [1, 1, 1, 1]
    assert message.count("; ") == 3
    assert "\n" not in message


def test_a_refused_value_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADTALLY_DRIVER_MEMORY", "pass-word")
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert "pass-word" not in str(refused.value)
    assert refused.value.__cause__ is None and refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("hour_grace", "PT15M", timedelta(minutes=15)),
        ("hour_grace", "900", timedelta(minutes=15)),
        ("hour_grace", "0.5", timedelta(milliseconds=500)),
        ("hour_grace", "0", timedelta(0)),
        ("hour_grace", "P36500D", timedelta(days=36_500)),
        ("future_skew", "PT0.000001S", timedelta(microseconds=1)),
        ("future_skew", "300", timedelta(minutes=5)),
        ("earliest_event_time", "1970-01-01T00:00:00Z", datetime(1970, 1, 1, tzinfo=UTC)),
        ("earliest_event_time", "2020-01-01T02:00:00+02:00", datetime(2020, 1, 1, tzinfo=UTC)),
        ("max_files_per_batch", "1", 1),
        ("max_bytes_per_batch", "1024", 1024),
        ("split_bytes", "4096", 4096),
        ("driver_memory", "2g", "2g"),
        ("spark_master", "spark://host:7077", "spark://host:7077"),
    ],
)
def test_a_setting_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: Any) -> None:
    monkeypatch.setenv(f"ADTALLY_{name.upper()}", value)
    assert getattr(load_settings(), name) == expected


def test_times_are_held_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADTALLY_EARLIEST_EVENT_TIME", "2020-06-01T02:00:00+02:00")
    earliest = load_settings().earliest_event_time
    assert (earliest.tzinfo, earliest.hour) == (UTC, 0)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An empty ADTALLY_HOME once meant the working folder itself."""
    monkeypatch.delenv("ADTALLY_CACHE_DIR", raising=False)
    monkeypatch.setenv(f"ADTALLY_{name.upper()}", "")
    assert load_settings() == Settings()
    assert getattr(load_settings(), name) == Settings.model_fields[name].default


def test_an_override_wins_over_the_environment_and_none_is_no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADTALLY_SPLIT_BYTES", "8192")
    assert load_settings(split_bytes=4096).split_bytes == 4096
    assert load_settings(split_bytes=None).split_bytes == 8192


def test_settings_cannot_be_changed() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        setattr(settings, "split_bytes", 4096)  # noqa: B010


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def paths(settings: Settings) -> dict[str, str]:
    return {
        "home": str(settings.home_path),
        "lakehouse": settings.lakehouse_uri,
        "landing": str(settings.landing_path),
        "checkpoints": str(settings.checkpoints_path),
        "marts": str(settings.marts_path),
        "scratch": str(settings.scratch_path),
        "key_index": str(settings.key_index_path),
    }


@pytest.mark.parametrize("given", ["home", "./home", "{cwd}/home", "~/home"])
def test_everything_lies_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ADTALLY_HOME", given.format(cwd=tmp_path))
    home = tmp_path / "home"
    assert paths(load_settings()) == {
        "home": str(home),
        "lakehouse": str(home / "lakehouse"),
        "landing": str(home / "landing"),
        "checkpoints": str(home / "checkpoints"),
        "marts": str(home / "marts" / "marts.duckdb"),
        "scratch": str(home / "scratch"),
        "key_index": str(home / "key_index"),
    }


def test_home_is_in_the_working_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert settings.home_path == tmp_path / ".adtally"
    monkeypatch.chdir("/")
    assert settings.home_path == tmp_path / ".adtally", "it stays where it was when it was first asked for"


@pytest.mark.parametrize(
    ("lakehouse", "table"),
    [
        ("lake", "{cwd}/lake/events"),
        ("{cwd}/lake/", "{cwd}/lake/events"),
        ("~/lake", "{cwd}/lake/events"),
        ("s3a://bucket", "s3://bucket/events"),
        ("s3a://bucket/lake/", "s3://bucket/lake/events"),
        ("s3://bucket/lake", "s3://bucket/lake/events"),
    ],
)
def test_the_lakehouse_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lakehouse: str, table: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings(lakehouse=lakehouse.format(cwd=tmp_path))
    assert settings.table_uri("events") == table.format(cwd=tmp_path)
    assert settings.landing_path == tmp_path / ".adtally" / "landing"


def test_landing_and_jars_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(landing="in", cache_dir="cache")
    assert (settings.landing_path, settings.jar_cache_path) == (tmp_path / "in", tmp_path / "cache" / "jars")
    assert settings.lakehouse_uri == str(tmp_path / ".adtally" / "lakehouse")


def test_jars_are_in_the_cache_of_the_user_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADTALLY_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings().jar_cache_path == tmp_path / ".cache" / "adtally" / "jars"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert load_settings().jar_cache_path == tmp_path / "xdg" / "adtally" / "jars"


@pytest.mark.parametrize("name", ["a[1]", "a]", "pct%20x", "bs\\x", "pi|pe", "up^", "new\nline"])
def test_a_path_with_which_tables_cannot_be_opened_is_refused_on_one_line(tmp_path: Path, name: str) -> None:
    for setting in ("home", "lakehouse"):
        with pytest.raises(ConfigurationError, match=f"ADTALLY_{setting.upper()}: .* has the character") as caught:
            load_settings(**{"home": tmp_path, setting: str(tmp_path / name)})
        assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my ads", "O'Brien", 'a"b', "a$b", "ümlaut", "h#x", "q?x", "{b}", "c,d", "a*b", "a;b", "a&b"])
def test_any_other_path_is_taken(tmp_path: Path, name: str) -> None:
    assert load_settings(home=tmp_path / name).table_uri("events") == str(tmp_path / name / "lakehouse" / "events")
