"""A service in Java: its jars are pinned by a lock, and checked on every start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from services.launcher.jars import CONF, ensure_jars, read_lock
from services.launcher.service import Program, Progress, Role, Service


class JavaService(Service):
    """A service that Java runs from the jars of ``conf/<name>/jars.lock.json``.

    ``java`` returns Java's executable or raises an error; only a start calls it. ``heap`` is the largest heap, as 512m.
    """

    default_heap: str

    def __init__(
        self, root: Path, *, jar_cache: Path, java: Callable[[], Path], heap: str | None = None, ends_with_parent: bool = False
    ) -> None:
        super().__init__(root, ends_with_parent=ends_with_parent)
        self._jar_cache, self._java = jar_cache, java
        self._heap = heap or self.default_heap
        self.lock = read_lock(self.name)
        self.version = self.lock.version

    def program(self, progress: Progress) -> Program:
        """Return Java with the class path. Raises MachineError if a jar differs from the lock, or without Java."""
        java = self._java()
        jars = ensure_jars(self.lock, self._jar_cache, java, progress)
        classpath = self._conf / "classpath.args"
        classpath.parent.mkdir(exist_ok=True)
        classpath.write_text(f'-cp "{":".join(str(jar) for jar in jars)}"\n', "utf-8")
        return Program(java, (f"@{classpath}",))

    def arguments(self, program: Program, role: Role) -> list[str]:
        """Return the arguments of Java for a process."""
        return [*program.arguments, *self._jvm(role), *role.main]

    def _jvm(self, role: Role) -> list[str]:
        return [
            *role.options,
            "-XX:+ExitOnOutOfMemoryError",
            "-Djava.net.preferIPv4Stack=true",
            "-Dlog4j2.formatMsgNoLookups=true",
            f"-Dlog4j2.configurationFile={(CONF / 'log4j2.xml').as_uri()}",
            f"-Dadtally.log={self._log(role.name).with_suffix('')}",
        ]
