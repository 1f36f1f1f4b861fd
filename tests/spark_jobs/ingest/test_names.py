"""Names for people to read: what is read from the files, and when table `names` is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable

from spark_jobs.config import load_settings
from spark_jobs.errors import NamesFileError
from spark_jobs.ingest.names import load_names, names_file_problems, read_names
from spark_jobs.lake.writes import ensure_tables


def land(landing: Path, name: str, *lines: str, header: str = "kind,id,name") -> None:
    path = landing / "names" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join((header, *lines)) + "\n", "utf-8")


def test_the_later_of_two_names_holds(tmp_path: Path) -> None:
    land(tmp_path, "b.csv", "ad,a1,Blue shoes,x", header="kind,id,name,note")
    land(tmp_path, "a.csv", "store,s1,S", "ad,a1,Red shoes", " ad , a2 , Élan ")
    assert [(row["kind"], row["id"], row["name"], row["source_file"]) for row in read_names(tmp_path)] == [
        ("ad", "a1", "Blue shoes", "names/b.csv"),
        ("ad", "a2", "Élan", "names/a.csv"),
        ("store", "s1", "S", "names/a.csv"),
    ]


def campaigns(landing: Path, header: str, *lines: str) -> None:
    path = landing / "campaigns" / "c.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join((header, *lines)) + "\n", "utf-8")


def test_the_campaigns_files_may_name_campaigns_and_stores(tmp_path: Path) -> None:
    """A row without a name gives none, the later row and the names files win, and a formula is a name as any other text."""
    rows = ["c1,s1,Summer,The shop", "c1,s1,Summer 2,", "c2,s2,,", "c3,s2,=HYPERLINK(1),Second shop"]
    campaigns(tmp_path, "campaign_id,store_id,campaign_name,store_name", *rows)
    land(tmp_path, "a.csv", "store,s2,Named apart")
    assert [(row["kind"], row["id"], row["name"], row["source_file"]) for row in read_names(tmp_path)] == [
        ("campaign", "c1", "Summer 2", "campaigns/c.csv"),
        ("campaign", "c3", "=HYPERLINK(1)", "campaigns/c.csv"),
        ("store", "s1", "The shop", "campaigns/c.csv"),
        ("store", "s2", "Named apart", "names/a.csv"),
    ]


def test_campaigns_files_without_names_are_read_as_before(tmp_path: Path) -> None:
    campaigns(tmp_path, "campaign_id,store_id", "c1,s1")
    assert read_names(tmp_path) == []


@pytest.mark.parametrize("name", ["\x1b[31mred", "x" * 201, "two\u2028lines"])
def test_a_bad_name_in_a_campaigns_file_is_named(tmp_path: Path, name: str) -> None:
    campaigns(tmp_path, "campaign_id,store_id,store_name", f"c1,s1,{name}")
    with pytest.raises(NamesFileError, match=r"^campaigns/c\.csv, line 2: store_name must have 1 to 200 printable characters$"):
        read_names(tmp_path)


@pytest.mark.parametrize(
    ("lines", "header", "says"),
    [
        (["ad,a1"], "kind,id", "names/a.csv: columns missing: name"),
        (["advert,a1,x"], "kind,id,name", "names/a.csv, line 2: kind must be one of campaign, ad, store, not 'advert'"),
        (["ad,a1,x", "ad,,x"], "kind,id,name", "names/a.csv, line 3: id must have 1 to 128 printable characters"),
        (["ad,a1"], "kind,id,name", "names/a.csv, line 2: name must have 1 to 200 printable characters"),
        (["ad,a1,\x1b[31mred"], "kind,id,name", "names/a.csv, line 2: name must have 1 to 200 printable characters"),
        ([f"ad,a1,{'x' * 201}"], "kind,id,name", "names/a.csv, line 2: name must have 1 to 200 printable characters"),
    ],
)
def test_what_breaks_the_contract_is_named(tmp_path: Path, lines: list[str], header: str, says: str) -> None:
    land(tmp_path, "a.csv", *lines, header=header)
    with pytest.raises(NamesFileError) as caught:
        read_names(tmp_path)
    assert str(caught.value) == says


def test_the_table_follows_the_files_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, lakehouse=None)
    ensure_tables(settings)
    settings.landing_path.mkdir()
    assert load_names(settings) == 0
    land(settings.landing_path, "a.csv", "ad,a1,Red shoes", "store,s1,S")
    assert [load_names(settings), load_names(settings)] == [1, 1]
    land(settings.landing_path, "a.csv", "advert,a1,x")
    with pytest.raises(NamesFileError):
        load_names(settings)
    assert names_file_problems(settings) == [
        "names/a.csv, line 2: kind must be one of campaign, ad, store, not 'advert'; the names in the marts stay"
    ]
    assert DeltaTable(settings.table_uri("names")).to_pyarrow_table().num_rows == 2
    (settings.landing_path / "names" / "a.csv").unlink()
    assert load_names(settings) == 2
    assert DeltaTable(settings.table_uri("names")).to_pyarrow_table().num_rows == 0
