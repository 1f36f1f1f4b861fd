"""The rules of attribution: lookback windows, half-life, view-through. ``HOME/rules/attribution.toml``; see docs/rules.md."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from spark_jobs.config import Settings
from spark_jobs.lake.landing_view import fresh_rules_path
from spark_jobs.rules.exempt import PLACEHOLDERS, ExemptUsers
from spark_jobs.rules.store import read_rules
from spark_jobs.units import DAY_US

KIND = "attribution"
MODELS = ("last_click", "first_click", "linear", "position_based", "time_decay")


class AttributionRules(BaseModel):
    """The rules that credit an order's touches. All models are computed for all windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_days: Annotated[
        tuple[Annotated[int, Field(ge=1, le=365)], ...],
        Field(min_length=1, max_length=16, description="Lookback windows in days, ascending."),
    ] = (1, 7, 14, 28, 30)
    half_life_days: Annotated[
        float, Field(ge=0.001, le=3650, allow_inf_nan=False, description="time_decay: a touch this much older weighs half.")
    ] = 7.0
    view_through: Annotated[bool, Field(description="Whether impressions count if no click is in the window.")] = False
    view_through_hours: Annotated[int, Field(ge=1, le=8760, description="How long before an order an impression may lie.")] = 24
    exempt_users: ExemptUsers = PLACEHOLDERS

    @field_validator("window_days")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must be ascending, each once")
        return value

    @property
    def lookback_us(self) -> int:
        """The longest window, in microseconds. An earlier touch counts in no window."""
        return self.window_days[-1] * DAY_US


def load_attribution_rules(settings: Settings) -> AttributionRules:
    """Read today's rules. Raises RuleFileError if the file is wrong, StoreError if it is in a store that does not answer."""
    return read_rules(fresh_rules_path(settings) / "attribution.toml", AttributionRules)
