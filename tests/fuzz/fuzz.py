"""The fuzzer: changes inputs of a corpus, by a seed, and checks each. Time and memory are limits that no input may exceed."""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import CORPUS, Target

CPU_SECONDS = 10.0
"""CPU time of one input: hundreds of times what any needs, so that a busy machine fails none."""
PEAK_BYTES = 600 * 1024 * 1024
"""By how much one input may raise the largest memory that the process ever had."""
_LONGEST = 256 * 1024


@dataclass(frozen=True)
class Failure:
    """An input that breaks a target, as short as it was found, and why."""

    target: str
    data: bytes
    error: str

    def save(self) -> Path:
        """Put the input into the corpus, so that every later run checks it; return its file."""
        path = CORPUS / self.target / f"found-{hashlib.sha256(self.data).hexdigest()[:12]}"
        path.write_bytes(self.data)
        return path


def mutated(target: Target) -> st.SearchStrategy[bytes]:
    """Return a strategy: an input of the corpus with some changes, sometimes spliced with another one."""
    corpus = [path.read_bytes() for path in target.corpus]

    @st.composite
    def changed(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(corpus)))
        for _ in range(draw(st.integers(0, 6))):
            at = draw(st.integers(0, len(data)))
            match draw(st.integers(0, 6)):
                case 0 if data:
                    data[min(at, len(data) - 1)] = draw(st.integers(0, 255))
                case 1:
                    data[at:at] = draw(st.binary(max_size=8))
                case 2:
                    del data[at : at + draw(st.integers(1, 40))]
                case 3 if target.tokens:
                    data[at:at] = draw(st.sampled_from(target.tokens))
                case 4 if target.tokens:
                    token = draw(st.sampled_from(target.tokens))
                    data[at : at + len(token)] = token
                case 5:
                    other = draw(st.sampled_from(corpus))
                    data[at:] = other[draw(st.integers(0, len(other))) :]
                case 6:
                    end = min(len(data), at + draw(st.integers(1, 60)))
                    data[at:at] = data[at:end] * draw(st.integers(1, 30))
        return bytes(data[:_LONGEST])

    return changed()


def check(target: Target, data: bytes, folder: Path) -> None:
    """Check one input, and what it takes. Raises what the target raises, or AssertionError."""
    cpu, peak = time.process_time(), _peak_bytes()
    target.check(data, folder)
    spent, grown = time.process_time() - cpu, _peak_bytes() - peak
    assert spent < CPU_SECONDS, f"took {spent:.1f} s of CPU"
    assert grown < PEAK_BYTES, f"took {grown / 2**20:.0f} MiB"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(target: Target, folder: Path, *, examples: int, number: int) -> Failure | None:
    """Check ``examples`` inputs that the seed ``number`` gives; return the shortest failure that was found."""
    last: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(mutated(target))
    def attempt(data: bytes) -> None:
        last[:] = [data]
        check(target, data, folder)

    try:
        attempt()
    except Exception as error:  # whatever a target raises is the finding
        return Failure(target.name, last[0], f"{type(error).__name__}: {error}")
    return None


def run_for(
    target: Target, folder: Path, *, minutes: float, number: int, clock: Callable[[], float], say: Callable[[str], None]
) -> Failure | None:
    """Check inputs of one seed after the other until ``minutes`` have passed, or one fails."""
    end, done, examples = clock() + minutes * 60, 0, 200
    while clock() < end:
        failure = run(target, folder, examples=examples, number=number)
        if failure is not None:
            say(f"{target.name}: seed {number} fails after {done} inputs: {failure.error}")
            return failure
        done, number = done + examples, number + 1
    say(f"{target.name}: {done} inputs without a failure, up to seed {number - 1}")
    return None
