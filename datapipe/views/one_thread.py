"""Imported first of all by the server that processes of views are forked from: libraries that read these variables as
they are loaded compute with one thread, as the processes are the parallelism."""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
