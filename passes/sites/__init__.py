"""Gradient sites, one file per kind. A new kind is a new file and one line in ``KINDS``."""

from __future__ import annotations

from torch import fx

from flashnorm_compile.passes.sites.base import Context, Site
from flashnorm_compile.passes.sites.convolution import ConvolutionBiasSite, ConvolutionSite
from flashnorm_compile.passes.sites.embedding import EmbeddingSite
from flashnorm_compile.passes.sites.fused_convolution import FusedConvolutionSite
from flashnorm_compile.passes.sites.fused_matmul import FusedMatmulSite
from flashnorm_compile.passes.sites.generic import GenericSite
from flashnorm_compile.passes.sites.matmul import MatmulSite
from flashnorm_compile.passes.sites.reduction import ReductionSite

KINDS = (
    FusedMatmulSite,
    MatmulSite,
    ReductionSite,
    EmbeddingSite,
    FusedConvolutionSite,
    ConvolutionSite,
    ConvolutionBiasSite,
    GenericSite,
)

__all__ = ["KINDS", "Context", "Site", "site_at"]


def site_at(node: fx.Node, context: Context) -> Site | None:
    """Return the site of a node where samples meet; None if it is no sum over samples."""
    for kind in KINDS:
        if (site := kind.match(node, context)) is not None:
            return site
    return None
