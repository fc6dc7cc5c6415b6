"""Shared set-up: offline, few threads, fixed seeds, and a fresh compiler for every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Sizes are symbols in nearly every test: a twentieth of its time.
os.environ.setdefault("SYMPY_CACHE_SIZE", "200000")

import gc
import logging

import pytest
import torch

# Its records are for a trace collector; they would fill the report of every failed test.
logging.getLogger("torch.__trace").propagate = False
torch.set_num_threads(1)
# A compiler makes many objects and few circles of them: half as many collections of garbage.
gc.set_threshold(20_000, 20, 10)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "inductor: compiles with the Inductor lowering (slow)")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Seed, and forget every compiled graph and setting, so that no test sees another one's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    # A compilation by the backend's name leaves these set.
    with torch._dynamo.config.patch(suppress_errors=False, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()
