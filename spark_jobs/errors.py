"""The errors of this package."""

from __future__ import annotations


class AdtallyError(Exception):
    """Base of all errors that a user sees as one line.

    ``exit_code`` is the process's exit status: 1 the data or a check failed, 2 wrong use. ``hint`` says what to do; it is printed
    after the message. ``excerpt`` is printed below that line. ``retryable``: trying again can help.
    """

    exit_code = 1
    excerpt = ""
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(AdtallyError):
    """An option, a setting or a path is wrong."""

    exit_code = 2


class ConfigurationError(UsageError):
    """A setting was refused at the start."""


class MachineError(UsageError):
    """The machine lacks Java, a jar or an extension."""


class BusyError(AdtallyError):
    """Another process holds the lock that this one needs."""

    retryable = True


class CommitConflictError(AdtallyError):
    """Another writer changed the same rows of a table first. Nothing was committed."""

    retryable = True


class InterruptedIngestError(AdtallyError):
    """A signal stopped the ingest before it had read all input. Every batch that it committed is complete."""

    retryable = True


class JavaLostError(AdtallyError):
    """Java, in which Spark runs, has ended while it was needed. An interrupted batch runs again and decides the same."""

    retryable = True


class StoppedError(AdtallyError):
    """A batch did not begin, because a signal stopped the ingest. It runs at the next start."""

    retryable = True


class ConservationError(AdtallyError):
    """offered = accepted + duplicate + conflict + rejected does not hold. The batch is not committed."""


class CampaignFileError(AdtallyError):
    """A campaigns CSV breaks the contract; the message names the file, the line and the rule."""


class NamesFileError(AdtallyError):
    """A CSV of names breaks the contract; the message names the file, the line and the rule."""


class LandingPathError(AdtallyError):
    """A file that Spark planned to read cannot be found in the landing folder; the message names it."""


class RuleFileError(UsageError):
    """A rule file is wrong; the message names the file and the rule."""


class KafkaConfigurationError(UsageError):
    """kafka.toml is wrong; the message names the entry, never its value."""


class KafkaError(AdtallyError):
    """A broker does not answer, or refuses."""

    retryable = True


class PublicationError(AdtallyError):
    """A table cannot be published: versions are gone, or the topic is another table's."""


class OffsetGapError(AdtallyError):
    """The topic no longer has the records to read next; the message names their offsets."""


class TableCorruptionError(AdtallyError):
    """A Delta table contradicts the registry, or the data that were derived from it."""


class StoreError(AdtallyError):
    """An object store does not answer, or refuses; the message names the operation and the key.

    ``retryable`` is False for what does not pass: the credentials have no right, or there is no such bucket.
    """

    retryable = True


class LeaseLostError(AdtallyError):
    """Another machine has taken over what this process was doing. Nothing was committed after that."""

    retryable = True


class RawBehindError(AdtallyError):
    """The table of raw records lacks records that the recount needs."""

    retryable = True
