"""Reads rule sets from their files, and keeps them by hash in table `rule_sets`, so that a result can be explained years later."""

from __future__ import annotations

import hashlib
import json
import tomllib
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from spark_jobs.config import Settings
from spark_jobs.errors import AdtallyError, RuleFileError
from spark_jobs.lake.acts import Act, act_info
from spark_jobs.lake.lake import Lake
from spark_jobs.lake.tables import RULE_SETS
from spark_jobs.lake.writes import ensure_tables
from spark_jobs.steps import Step
from spark_jobs.toml_text import parse_toml

_EXEMPT = "exempt_users"
Rules = TypeVar("Rules", bound=BaseModel)


def read_rules(path: Path, model: type[Rules], **also: object) -> Rules:
    """Read the rules of a TOML file as a ``model``, which has the defaults if there is no file. ``also`` are further fields.

    Raises RuleFileError, which names the file, the entry and the problem.
    """
    try:
        content = parse_toml(path.read_text("utf-8")) if path.exists() else {}
        return model(**content, **also)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RuleFileError(f"{path} cannot be read: {error}") from None
    except TypeError:
        raise RuleFileError(f"{path}: {', '.join(also)} cannot be set there") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise RuleFileError(f"{path}: {problems}", hint="docs/rules.md describes every entry") from None


def canonical(rules: BaseModel) -> str:
    """Return the rules as JSON; the same rules give the same text.

    Leaves out an empty list of exempt users, which older rule sets lack.
    """
    return rules.model_dump_json(exclude=None if getattr(rules, _EXEMPT, ()) else {_EXEMPT})


def _parse_rules(content: str, model: type[Rules]) -> Rules:
    """Parse the output of ``canonical``, independently of the model's present defaults."""
    fields = json.loads(content)
    if _EXEMPT in model.model_fields:
        fields.setdefault(_EXEMPT, [])
    return model.model_validate(fields)


def rule_set_hash(kind: str, content: str) -> str:
    """Return the SHA-256 (64 hex digits) of a kind and its content."""
    return hashlib.sha256(f"{kind}\n{content}".encode()).hexdigest()


def keep_rule_set(settings: Settings, kind: str, rules: BaseModel, now: datetime) -> str:
    """Append the rules to `rule_sets` unless it has them; returns their hash. Two processes at once may append equal rows."""
    content = canonical(rules)
    name = rule_set_hash(kind, content)
    lake = Lake(settings)
    if not lake.exists(RULE_SETS):
        ensure_tables(settings)
    if name not in lake.rows(RULE_SETS)["rule_set"].to_pylist():
        row = {"rule_set": name, "kind": kind, "content": content, "set_at": now}
        arguments = {"kind": kind, "rule_set": name}
        info = act_info(Act.RULES, reason="the rules in use have changed", arguments=arguments, now=now)
        lake.append(RULE_SETS, pa.Table.from_pylist([row], RULE_SETS.schema), Step.RULE_SETS, info=info)
    return name


def held_rules(settings: Settings, name: str, model: type[Rules]) -> Rules:
    """Return the rule set with this hash, as it was used. Raises AdtallyError if the table does not have it."""
    for row in Lake(settings).rows(RULE_SETS).to_pylist():
        if row["rule_set"] == name:
            return _parse_rules(row["content"], model)
    raise AdtallyError(f"table rule_sets does not have the rule set {name}", hint="it was removed, or the table is of another home")


def rule_sets_of(settings: Settings, kind: str, model: type[Rules]) -> dict[str, Rules]:
    """Return every used rule set of a kind, by its hash."""
    rows = Lake(settings).rows(RULE_SETS).to_pylist()
    return {row["rule_set"]: _parse_rules(row["content"], model) for row in rows if row["kind"] == kind}
