"""Spark and Delta jobs of adtally: no orchestrator in here."""

import os

# Nothing here computes with matrices, but OpenBLAS, which numpy loads, starts a thread for each core, and these first wait busily:
# a tenth of a second of CPU time in each process and each fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
