"""From Dynamo's graph through AOTAutograd, with a look at its graph on the way."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import fx

from flashnorm_compile import _torch
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.pipeline import Request, make_private
from flashnorm_compile.passes.state_writes import StateWrites
from flashnorm_compile.state import StepState


class GraphPass(_torch.CustomGraphPass):
    """A pass over AOTAutograd's graph, as Inductor calls it.

    A refusal is kept rather than raised, so that the compiler's own error does not wrap it.

    Args:
        state: of the step.
        work: what to do with the graph.
        fixed_size: a symbolic size that is fixed once the graph is rewritten.
    """

    def __init__(
        self,
        state: StepState,
        work: Request | StateWrites | None,
        fixed_size: torch.SymInt | None = None,
    ) -> None:
        self.state = state
        self.work = work
        self.fixed_size = fixed_size
        self.error: PrivacyError | None = None
        self.ran = False

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite or check the graph."""
        self.ran = True
        try:
            match self.work:
                case Request() as request:
                    if (report := make_private(graph, request)) is not None:
                        self.state.reports.append(report)
                    if self.fixed_size is not None:
                        _torch.fix_size(self.fixed_size)
                case StateWrites() as check:
                    check(graph)
        except PrivacyError as error:
            self.error = error

    def uuid(self) -> str:
        """Identify the rewrite: its sources, the options and the versions."""
        return self._uuid

    @functools.cached_property
    def _uuid(self) -> str:
        # Where the environment forces AOTAutograd's cache on, a graph of ours must not be found
        # there: it would come back without this pass having looked at it.
        once = secrets.token_hex() if _torch.autograd_cache_is_on() else ""
        options = astuple(self.state.options)
        parts = (_sources_digest(), torch.__version__, options, self.work, once)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None
    ) -> Callable[..., Any]:
        """Compile Dynamo's graph by the lowering of the options, through this pass."""
        if self.state.options.lowering == "eager":
            return _torch.compile_without_codegen(gm, inputs, self)
        return _torch.compile_with_inductor(gm, inputs, self, inductor_settings(mode))


def inductor_settings(mode: str | None) -> Mapping[str, Any]:
    """Return Inductor's settings for a mode of ``torch.compile``.

    Raises:
        PrivacyError: there is no such mode.
    """
    modes = _torch.inductor_modes()
    if mode is not None and mode not in modes:
        raise PrivacyError(f"mode={mode!r} is not valid; choose one of {', '.join(modes)}.")
    return {} if mode is None else modes[mode]


def replays_graphs(mode: str | None) -> bool:
    """Return whether a mode of ``torch.compile`` replays kernels as CUDA graphs."""
    name = "triton.cudagraphs"
    return bool(inductor_settings(mode).get(name, _torch.inductor_setting(name)))


@functools.cache
def _sources_digest() -> str:
    import flashnorm_compile.kernels
    import flashnorm_compile.passes

    digest = hashlib.sha256()
    for package in (flashnorm_compile, flashnorm_compile.passes, flashnorm_compile.kernels):
        (folder,) = package.__path__
        for path in sorted(pathlib.Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
