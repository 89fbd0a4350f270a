"""All tests run on CPU and raise on silent broadcasting; compiled programs are kept from one test run to the next."""

import os
from pathlib import Path

# Environment variables, before anything imports jax: processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/gptjax/compiled-tests").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
