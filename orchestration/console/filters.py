"""The filters of a page, which its URL carries: so a link is a view."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from urllib.parse import urlencode

from spark_jobs.attribution.rules import MODELS
from spark_jobs.errors import UsageError

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
URL_NAMES = {"first": "from", "last": "to"}
"""The parameters of the URL whose names are words of Python, or would say too little as a field."""


@dataclass(frozen=True)
class Filters:
    """What a page shows. Days are UTC, both inclusive; None: the newest day with data. Texts are empty where nothing is chosen.

    ``sort`` is a table and a column, as ``campaigns.spend``, with ``-`` in front for descending; ``search`` keeps the rows in which
    a text contains it; ``rows`` is ``all`` where a table shall not be cut.
    """

    advertiser: str = ""
    campaign: str = ""
    first: date | None = None
    last: date | None = None
    region: str = ""
    currency: str = ""
    model: str = "last_click"
    window: int = 7
    search: str = ""
    sort: str = ""
    rows: str = ""

    @classmethod
    def of(cls, parameters: Mapping[str, str]) -> Filters:
        """Read the parameters of a URL; others are ignored. Raises UsageError that names a wrong one."""
        values = {field.name: parameters.get(URL_NAMES.get(field.name, field.name), "") for field in fields(cls)}
        first, last = _day(values, "first"), _day(values, "last")
        if first and last and first > last:
            raise UsageError(f"from={first} is after to={last}")
        model, window = values["model"] or cls.model, values["window"] or str(cls.window)
        if model not in MODELS:
            raise UsageError(f"there is no attribution model {model!r}", hint=f"one of {', '.join(MODELS)}")
        if not re.fullmatch(r"\d{1,4}", window):
            raise UsageError(f"window={window!r} is not a number of days")
        texts = {name: values[name] for name in ("advertiser", "campaign", "region", "currency", "search", "sort", "rows")}
        return cls(**texts, first=first or last, last=last or first, model=model, window=int(window))

    @staticmethod
    def names() -> set[str]:
        """The parameters of a URL that are filters."""
        return {URL_NAMES.get(field.name, field.name) for field in fields(Filters)}

    def parameters(self) -> dict[str, str]:
        """The parameters of the URL, without those that say what is the default."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}
        return {URL_NAMES.get(name, name): str(value) for name, value in found.items() if value is not None}

    def url(self, path: str, **changes: object) -> str:
        """The address of a page with these filters, but for ``changes`` (by field)."""
        query = urlencode(replace(self, **changes).parameters())  # type: ignore[arg-type]  # the fields' own types
        return f"{path}?{query}" if query else path


def _day(values: Mapping[str, str], name: str) -> date | None:
    text = values[name]
    if not text:
        return None
    try:
        if not _DAY.fullmatch(text):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{URL_NAMES[name]}={text!r} is not a day, as 2025-06-02") from None
