"""Checks what readers saw against the order of the ledger: each total must be that of some prefix of the committed batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.simulator.chaos.checks import Violation

Total = tuple[int, ...]
"""Measures of a batch or of what a reader saw, in one order."""


class Prefixes:
    """The totals of all prefixes of a ledger. ``batches`` are the measures of each batch, in the order of their commits."""

    def __init__(self, batches: Iterable[Total]) -> None:
        totals: list[Total] = []
        for batch in batches:
            before = totals[-1] if totals else (0,) * len(batch)
            totals.append(tuple(old + new for old, new in zip(before, batch, strict=True)))
        width = len(totals[0]) if totals else 0
        self._totals: list[Total] = [(0,) * width, *totals]

    def check(self, reader: str, seen: Sequence[Total]) -> list[int]:
        """Return for each total that a reader saw, in order, how many batches it has.

        If several prefixes have a total, the shortest possible one is taken. Raises Violation if no prefix has a total, or if only
        a shorter one than before does: the reader then went back.
        """
        found: list[int] = []
        for number, total in enumerate(seen):
            least = found[-1] if found else 0
            at = next((batches for batches in range(least, len(self._totals)) if self._totals[batches] == total), None)
            if at is None:
                went_back = total in self._totals[:least]
                what = f"went back behind batch {least}" if went_back else "no prefix of the committed batches gives it"
                raise Violation("prefix", f"{reader} saw {total} in reading {number}: {what}")
            found.append(at)
        return found
