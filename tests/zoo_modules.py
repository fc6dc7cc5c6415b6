"""Every small case, by name. The cases live in one file per topic."""

from __future__ import annotations

from driver import Case
from zoo_attention import ATTENTION
from zoo_calls import CALLS
from zoo_conv import CONV
from zoo_dense import DENSE
from zoo_losses import LOSSES
from zoo_parameters import PARAMETERS
from zoo_sharing import SHARING

ZOOS = {
    "dense": DENSE,
    "conv": CONV,
    "sharing": SHARING,
    "attention": ATTENTION,
    "parameters": PARAMETERS,
    "losses": LOSSES,
    "calls": CALLS,
}


def all_cases() -> dict[str, Case]:
    """Return the cases of every topic as ``topic-name``."""
    return {f"{topic}-{name}": case for topic, zoo in ZOOS.items() for name, case in zoo.items()}
