"""The errors of this package. Each says whether trying again can help (``retryable``) and what to do (``hint``)."""

from __future__ import annotations


class AdtallyError(Exception):
    """Base of all errors that reach a user as one line.

    ``exit_code`` is the process's exit status: 1 the data or a check failed, 2 wrong use.
    ``hint`` is what the reader can do about it; it is printed after the message. ``excerpt`` goes below that line as it is.
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
    """Wrong use: an option, a setting or a path that cannot be right."""

    exit_code = 2


class ConfigurationError(UsageError):
    """A setting was refused at the start."""


class MachineError(UsageError):
    """Something the machine must have is missing: Java, the jars, an extension."""


class BusyError(AdtallyError):
    """Another process holds the lock that this one needs."""

    retryable = True


class CommitConflictError(AdtallyError):
    """Another writer changed the same rows of a table first. Nothing was committed."""

    retryable = True


class InterruptedIngestError(AdtallyError):
    """The ingest was told to stop before it had taken all that is there. What it took is whole."""

    retryable = True


class JavaLostError(AdtallyError):
    """Java, in which Spark runs, has ended while it was needed. A batch that was cut off is made again as it was."""

    retryable = True


class StoppedError(AdtallyError):
    """A batch was not begun, for the ingest was told to stop. It is made at the next start."""

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
    """A rule file cannot be right; the message names the file and the rule."""


class KafkaConfigurationError(UsageError):
    """The file of the Kafka clusters cannot be right; the message names the entry, never its value."""


class KafkaError(AdtallyError):
    """A broker does not answer, or refuses. Trying again can help."""

    retryable = True


class PublicationError(AdtallyError):
    """What a table's versions hold cannot be published as it should: versions are gone, or the topic is another table's."""


class OffsetGapError(AdtallyError):
    """Records that were to be read next are not in the topic any more; the message names their offsets."""


class TableCorruptionError(AdtallyError):
    """A Delta table is not what the registry says, or contradicts what was derived from it."""


class RawBehindError(AdtallyError):
    """The table of raw records does not have yet what is to be recounted."""

    retryable = True
