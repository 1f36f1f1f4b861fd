"""A real object store for tests: one a test process, which starts with the first test that asks for it.

``place`` says where a test keeps its lakehouse: on a disk, or in the store. A test that takes it runs on both.
"""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
from pyspark import SparkContext

from services.launcher.s3 import BUCKET
from services.launcher.trial import throwaway_s3
from spark_jobs.config import Settings, load_settings
from spark_jobs.lake import store as object_store
from spark_jobs.lake.landing_view import land_folder
from spark_jobs.lake.locations import local_path
from spark_jobs.lake.places import StorePlace


@pytest.fixture(scope="session")
def store() -> Iterator[dict[str, str]]:
    """One store of the run: the variables by which it is reached, which this process has from now on, too.

    A test that needs a process without credentials takes `without_credentials`.
    """
    with throwaway_s3() as made:
        variables = made.environment()
        before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
        os.environ.update(variables)
        object_store._session.cache_clear()
        if SparkContext._active_spark_context is not None:  # a Java that runs already has no new variables for its workers
            SparkContext._active_spark_context.environment.update(variables)
        yield variables
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
        object_store._session.cache_clear()


@pytest.fixture
def without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This process finds no credentials of a store, neither in variables nor in files nor from a machine's role."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_store._session.cache_clear()
    yield
    object_store._session.cache_clear()


def fresh_prefix() -> str:
    """A location in the store that nothing has used. The test, or a fixture of it, takes `store`."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def prefix(store: dict[str, str]) -> str:
    """A location in the store that nothing has used."""
    return fresh_prefix()


class Location(ABC):
    """Where lakehouses of a test are kept."""

    @abstractmethod
    def settings(self, home: Path, **settings: Any) -> Settings:
        """Settings of a home with a lakehouse of its own, which does not exist yet."""

    @abstractmethod
    def machines(self, folder: Path, number: int) -> list[Settings]:
        """Settings of so many machines on one lakehouse and one landing folder: each has a disk of its own where it can."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Copy a lakehouse."""

    def copied(self, home: Settings, target: Path) -> Settings:
        """A copy of a home, with the times of its files, and of its lakehouse, with the same settings."""
        made = self.settings(target, **home.model_dump(exclude={"home", "lakehouse"}, exclude_unset=True))
        shutil.copytree(home.home_path, target, dirs_exist_ok=True)
        if not Path(home.lakehouse_uri).is_relative_to(home.home_path):
            self.copy(home.lakehouse_uri, made.lakehouse_uri)
        return made


class Disk(Location):
    """A folder of the home."""

    def settings(self, home: Path, **settings: Any) -> Settings:
        return load_settings(home=home, **settings)

    def machines(self, folder: Path, number: int) -> list[Settings]:
        """All are one: a lakehouse on a disk has one home."""
        return [self.settings(folder / "home")] * number

    def copy(self, source: str, target: str) -> None:
        shutil.copytree(source, target)


class Bucket(Location):
    """The store; tables are copied into it and within it."""

    def settings(self, home: Path, **settings: Any) -> Settings:
        return load_settings(home=home, lakehouse=fresh_prefix(), **settings)

    def machines(self, folder: Path, number: int) -> list[Settings]:
        lakehouse, landing = fresh_prefix(), folder / "landing"
        return [load_settings(home=folder / f"home-{one}", lakehouse=lakehouse, landing=landing) for one in range(number)]

    def copy(self, source: str, target: str) -> None:
        bucket = object_store.object_store(f"s3://{BUCKET}")
        below = target.removeprefix(f"s3://{BUCKET}/")
        if (folder := local_path(source)) is not None:
            for path in folder.rglob("*"):
                if path.is_file() and not path.name.startswith("."):
                    obstore.put(bucket, f"{below}/{path.relative_to(folder).as_posix()}", path)
            return
        above = source.removeprefix(f"s3://{BUCKET}/")
        for page in obstore.list(bucket, above):
            for found in page:
                obstore.copy(bucket, found["path"], below + found["path"].removeprefix(above))


DISK, STORE = "disk", "store"
PLACES = (DISK, pytest.param(STORE, marks=[pytest.mark.services, pytest.mark.trial]))
"""On a disk in each run, in the store in `make test-services`."""
EVERYWHERE = pytest.mark.parametrize("place", (DISK, STORE), indirect=True)
"""On both in each run: for tests of seconds."""


@pytest.fixture(scope="session", params=PLACES)
def place(request: pytest.FixtureRequest) -> Location:
    """Where the test's lakehouses are: it runs once on each."""
    if request.param == DISK:
        return Disk()
    request.getfixturevalue("store")
    return Bucket()


class MachineLost(BaseException):
    """The machine is lost at this moment: nothing of its code catches this."""


@contextmanager
def lost_after(requests: int, *operations: str) -> Iterator[None]:
    """Lose the machine at the first call of these methods of StorePlace after ``requests`` of them. The block must get there."""
    left = iter(range(requests))

    def dying(name: str) -> Callable[..., object]:
        request = getattr(StorePlace, name)

        def lost(*arguments: object) -> object:
            if next(left, None) is None:
                raise MachineLost
            return request(*arguments)

        return lost

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MachineLost):
        for name in operations:
            patch.setattr(StorePlace, name, dying(name))
        yield


def upload(source: Path, target: str) -> None:
    """Put landing files into the store, in the order of their times."""
    land_folder(source, target)


def variables(settings: Settings) -> dict[str, str]:
    """The variables by which a process finds the home, the lakehouse and the landing folder of ``settings``."""
    named = {"ADTALLY_LAKEHOUSE": settings.lakehouse, "ADTALLY_LANDING": settings.landing}
    return {"ADTALLY_HOME": str(settings.home_path), **{name: str(value) for name, value in named.items() if value is not None}}
