"""Compare how long Kafka's input topics keep records with how long a request to erase a person may take."""

from __future__ import annotations

from datetime import timedelta

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]

from spark_jobs.config import Settings
from spark_jobs.ingest.kafka.config import KafkaCluster, read_kafka
from spark_jobs.lake.tables import STREAMS
from spark_jobs.texts import duration

_SECONDS = 10.0
_RETENTION = "retention.ms"


def retention_problems(settings: Settings) -> list[str]:
    """Return a line for each input topic that keeps records longer than ADTALLY_ERASURE_DAYS, or of which nobody can say."""
    found = []
    for cluster in read_kafka(settings).consumed:
        for stream in STREAMS:
            problem = _problem(cluster, cluster.topic(stream), timedelta(days=settings.erasure_days))
            if problem:
                found.append(f"topic {cluster.topic(stream)} of cluster {cluster.name} {problem}")
    return found


def _problem(cluster: KafkaCluster, topic: str, longest: timedelta) -> str:
    try:
        admin = AdminClient({**cluster.client_options(), "log_level": 0})
        resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
        config = admin.describe_configs([resource], request_timeout=_SECONDS)[resource].result(timeout=_SECONDS)
    except (KafkaException, TimeoutError) as error:
        said = error.args[0].str() if isinstance(error, KafkaException) else "it does not answer"
        return f"does not say how long it keeps records ({said}): ids may be in it"
    policy, kept_ms = config["cleanup.policy"].value, int(config[_RETENTION].value)
    if "delete" not in policy or kept_ms < 0:
        return "keeps records for ever, with the ids of erased people: set retention.ms below ADTALLY_ERASURE_DAYS"
    kept = timedelta(milliseconds=kept_ms)
    if kept > longest:
        limit = f"ADTALLY_ERASURE_DAYS ({longest.days} days)"
        return f"keeps records for {duration(kept.total_seconds())}, longer than {limit}: ids stay in it"
    return ""
