"""Formats numbers for people, and escapes texts from data for the terminal."""

from __future__ import annotations

import json


def printable(text: str, *, keep: str = "") -> str:
    r"""Escape characters that control a terminal or hide letters: ESC becomes \x1b, a byte that is not UTF-8 \xff.

    The characters of ``keep`` stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def printable_json(text: str) -> str:
    """Escape the same characters as JSON does, so that the JSON keeps its meaning."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # Python's form of a byte that is not UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: '1 file', '2 batches', '1,000 days', '3 histories'."""
    if number == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{number:,} {noun[:-1]}ies"
    return f"{number:,} {noun}{'es' if noun.endswith(('ch', 's', 'x')) else 's'}"


_CODES = {0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF", 3: "BHD IQD JOD KWD LYD OMR TND", 4: "CLF UYW"}
_DECIMALS = {code: decimals for decimals, codes in _CODES.items() for code in codes.split()}


def money(nanos: int, currency: str | None) -> str:
    """Format an amount with the decimals of its currency, and more digits if it has more; never rounds.

    '5,431' for JPY, '676.20' and '676.200001' for USD. All nine digits without a currency.
    """
    sign = "-" if nanos < 0 else ""
    units, rest = divmod(abs(nanos), 10**9)
    least = 9 if currency is None else _DECIMALS.get(currency, 2)
    digits = f"{rest:09d}".rstrip("0").ljust(least, "0")
    return f"{sign}{units:,}{'.' if digits else ''}{digits}"


_UNITS = ((31_536_000, "y", "d", 86_400), (86_400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1))


def duration(seconds: float | None) -> str:
    """Format seconds in at most two units: '0.3 s', '2 min 5 s', '3 d 1 h', '7,973 y 12 d'; '-' for None. Negative counts as 0."""
    if seconds is None:
        return "-"
    seconds = max(seconds, 0.0)
    whole = int(seconds)
    for size, big, small, part in _UNITS:
        if whole >= size:
            return f"{whole // size:,} {big} {whole % size // part} {small}"
    return f"{seconds:.1f} s"


def minor_digits(currency: str | None) -> int:
    """The decimals of a currency: 0 for JPY, 3 for KWD, 2 for most and for an unknown one."""
    return _DECIMALS.get(currency or "", 2)


def file_size(count: float) -> str:
    """A number of bytes with its unit: '812 B', '25.4 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
