"""How fast Goldgate trains, beside the stock trainer, and what each of its options does."""

import os

# Read before anything else here: `bench.gate`, whose tables are used, sets a thread a process for itself.
THREADS = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
