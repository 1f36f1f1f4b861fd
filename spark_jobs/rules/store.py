"""Rule sets: read from their file, hashed, and kept in table `rule_sets`, so that a result can be explained years later."""

from __future__ import annotations

import hashlib
import json
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, RuleFileError
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import RULE_SETS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step

_EXEMPT = "exempt_users"
Rules = TypeVar("Rules", bound=BaseModel)


def read_rules(path: Path, model: type[Rules], **also: object) -> Rules:
    """The rules of a TOML file as a ``model``; those of its defaults where there is no file. ``also`` are further fields.

    Raises RuleFileError that names the file, the entry and what is wrong with it.
    """
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text("utf-8")) if path.exists() else {}
        return model(**content, **also)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RuleFileError(f"{path} cannot be read: {error}") from None
    except TypeError:
        raise RuleFileError(f"{path}: {', '.join(also)} cannot be set there") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise RuleFileError(f"{path}: {problems}", hint="docs/rules.md describes every entry") from None


def canonical(rules: BaseModel) -> str:
    """The rules as JSON: the same rules give the same text.

    An empty list of exempt users is left out, as in rule sets from before there were any.
    """
    return rules.model_dump_json(exclude=None if getattr(rules, _EXEMPT, ()) else {_EXEMPT})


def _of_content(content: str, model: type[Rules]) -> Rules:
    """The inverse of ``canonical``, whatever the defaults of ``model`` are by now."""
    told = json.loads(content)
    if _EXEMPT in model.model_fields:
        told.setdefault(_EXEMPT, [])
    return model.model_validate(told)


def rule_set_hash(kind: str, content: str) -> str:
    """SHA-256 (64 hex digits) of a kind and its content."""
    return hashlib.sha256(f"{kind}\n{content}".encode()).hexdigest()


def keep_rule_set(settings: Settings, kind: str, rules: BaseModel, now: datetime) -> str:
    """Put the rules into `rule_sets`, unless they are there; their hash. Two that keep the same at once leave two equal rows."""
    content = canonical(rules)
    name = rule_set_hash(kind, content)
    lake = Lake(settings)
    if not lake.exists(RULE_SETS):
        ensure_tables(settings)
    if name not in _held(settings)["rule_set"].to_pylist():
        row = {"rule_set": name, "kind": kind, "content": content, "set_at": now}
        lake.append(RULE_SETS, pa.Table.from_pylist([row], RULE_SETS.schema), Step.RULE_SETS)
    return name


def held_rules(settings: Settings, name: str, model: type[Rules]) -> Rules:
    """The rule set with this hash, as it was used. Raises AdtallyError where the table does not have it."""
    held = _held(settings)
    for row in held.filter(pc.equal(held["rule_set"], name)).to_pylist():
        return _of_content(row["content"], model)
    raise AdtallyError(f"table rule_sets does not have the rule set {name}", hint="it was removed, or the table is of another home")


def rule_sets_of(settings: Settings, kind: str, model: type[Rules]) -> dict[str, Rules]:
    """Every rule set of a kind that was ever used, by its hash."""
    held = _held(settings)
    rows = held.filter(pc.equal(held["kind"], kind)).to_pylist()
    return {row["rule_set"]: _of_content(row["content"], model) for row in rows}


def _held(settings: Settings) -> pa.Table:
    return Lake(settings).rows(RULE_SETS)
