"""How stores are reached: one spelling of a location, credentials from where the tools of stores find them, no secret shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_jobs.config import load_settings
from spark_jobs.errors import ConfigurationError
from spark_jobs.lake import store as object_store
from spark_jobs.lake.duck import connect_delta, duckdb_secret
from spark_jobs.lake.locations import canonical, is_local, local_path, state_root
from spark_jobs.lake.places import open_place
from spark_jobs.lake.store import delta_options, s3_access

SECRET = "a-secret-that-nobody-sees"


@pytest.fixture
def profile(without_credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials in a file, under a profile that the environment names."""
    written = tmp_path / "credentials"
    written.write_text(f"[tally]\naws_access_key_id = KEY\naws_secret_access_key = {SECRET}\naws_session_token = TOKEN\n")
    (tmp_path / "config").write_text("[profile tally]\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(written))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "tally")
    object_store._session.cache_clear()


@pytest.mark.parametrize(
    ("location", "spelling"),
    [
        ("s3://bucket/lake", "s3://bucket/lake"),
        ("s3a://bucket/lake//", "s3://bucket/lake"),
        ("gs://bucket/lake/", "gs://bucket/lake"),
        ("az://container/lake", "az://container/lake"),
        ("/data/../lake/", "/lake"),
    ],
)
def test_a_location_has_one_spelling(location: str, spelling: str) -> None:
    assert canonical(location) == canonical(canonical(location)) == spelling
    assert is_local(spelling) == spelling.startswith("/")
    assert (local_path(spelling) is None) != is_local(spelling)


def test_state_is_in_the_home_or_beside_the_tables_of_a_store() -> None:
    assert state_root(Path("/home"), "/data/lake") == "/home"
    assert state_root(Path("/home"), "s3://bucket/lake") == "s3://bucket/lake/_adtally"


@pytest.mark.usefixtures("profile")
def test_a_profile_has_the_credentials_and_the_region() -> None:
    access = s3_access()
    assert (access.key_id, access.secret, access.token, access.region) == ("KEY", SECRET, "TOKEN", "eu-central-1")
    assert (access.endpoint, access.allow_http) == (None, False)
    options = delta_options("s3://bucket/lake") or {}
    assert (options["aws_secret_access_key"], options["aws_session_token"]) == (SECRET, "TOKEN")
    assert "aws_endpoint_url" not in options
    with connect_delta(lakehouse="s3://bucket/lake") as database:
        [(shown,)] = database.sql("select secret_string from duckdb_secrets()").fetchall()
    assert "key_id=KEY" in shown and "region=eu-central-1" in shown and SECRET not in shown


@pytest.mark.usefixtures("profile")
def test_no_representation_shows_a_credential() -> None:
    access = s3_access()
    for shown in (repr(access), str(access), f"{access}"):
        assert not any(secret in shown for secret in ("KEY", SECRET, "TOKEN"))


@pytest.mark.usefixtures("profile")
def test_variables_name_another_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "nowhere-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    access = s3_access()
    assert (access.region, access.endpoint, access.allow_http) == ("nowhere-1", "http://127.0.0.1:1", True)
    secret = duckdb_secret("s3://bucket/lake") or ""
    assert "endpoint '127.0.0.1:1'" in secret and "use_ssl false" in secret and "url_style 'path'" in secret


def test_a_path_needs_no_credentials(without_credentials: None, tmp_path: Path) -> None:
    assert delta_options(str(tmp_path)) is None
    assert duckdb_secret(str(tmp_path)) is None
    with pytest.raises(ConfigurationError, match="no credentials"):
        delta_options("s3://bucket/lake")


def test_another_name_of_the_scheme_is_the_same_place(prefix: str) -> None:
    other = load_settings(lakehouse=prefix.replace("s3://", "s3a://") + "/")
    open_place(prefix).write("one", b"1")
    assert [file.name for file in open_place(other.lakehouse_uri).list()] == ["one"]
    assert open_place(prefix.replace("s3://", "s3a://")).read("one") == b"1"


def test_a_store_is_checked_and_left_as_it_was(prefix: str, tmp_path: Path) -> None:
    place = open_place(prefix)
    assert place.check() == f"{prefix} answers; conditional puts hold"
    assert list(place.list()) == []
    assert open_place(str(tmp_path)).check() == f"{tmp_path} can be written"
    assert open_place(str(tmp_path / "new" / "lake")).check() == f"{tmp_path}/new/lake will be made"
