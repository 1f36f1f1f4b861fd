"""What runs the pipeline: marts, assets, the command line. Imports ``spark_jobs`` and ``expectations``, not the reverse."""

import os

# No tool reports home, however it is started. A person who wants it on says so in the environment.
for _name, _value in (
    ("DO_NOT_TRACK", "1"),
    ("DAGSTER_DISABLE_TELEMETRY", "yes"),
    ("GX_ANALYTICS_ENABLED", "False"),
    ("DBT_SEND_ANONYMOUS_USAGE_STATS", "False"),
):
    os.environ.setdefault(_name, _value)
