"""Show the CUDA code that Inductor makes of a private step, on a machine without a GPU.

    python benchmarks/gpu_code.py --workload gpt2-t256-b64 --output runs/gpu-code

The step is traced on the CPU. Then its graphs, whose tensors hold no data, are said to be on a
GPU of the H100's kind, and Inductor goes on from there. Printed are the kernels of each graph with
the memory they move, by Inductor's own count, and the library calls; with ``--compile`` Triton
also compiles every kernel. Nothing runs. Differences to a GPU: what Inductor decides by timing
(padding of matrix products, autotuning) is left out, and attention is the CPU's.

Needs a build of torch with CUDA, which a GPU is not needed for, and Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args
from unittest import mock

# Before Inductor is imported: worker processes would not know of the GPU, nor are graphs that
# come from a cache shown.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"

import torch
from methods import FlashNorm, Settings
from models import find_workload
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from flashnorm_compile import options as library

DEVICE = torch.device("cuda", 0)
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block_optin=232448,
    total_memory=80 * 2**30, L2_cache_size=50 * 2**20, uuid="", gcnArchName="",
)  # fmt: skip


class Driver:
    """What Triton asks of a GPU's driver before it launches anything."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return DEVICE


class Kernels:
    """The kernels that Inductor made, compiled if asked for, never loaded.

    Attributes:
        compiled: how many variants Triton compiled.
        failed: those that it did not: kernel, settings, error.
    """

    def __init__(self, *, compile: bool) -> None:
        self.compile = compile
        self.compiled = 0
        self.failed: list[tuple[str, dict[str, Any], str]] = []

    def take(self, autotuner: Any) -> None:
        """Stand in for ``CachingAutotuner.precompile``."""
        autotuner.launchers = [None]
        if not self.compile:
            return
        from triton.compiler import ASTSource, compile

        for config in autotuner.configs:
            meta, function = autotuner.triton_meta, autotuner.fn
            constants = meta["constants"] | config.kwargs
            signature = meta["signature"] | dict.fromkeys(config.kwargs, "constexpr")
            places = {(function.arg_names.index(name),): x for name, x in constants.items()}
            source = ASTSource(function, signature, places, meta["configs"][0])
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            try:
                compile(source, target=Driver().get_current_target(), options=options)
                self.compiled += 1
            except Exception as error:  # whatever the compiler raises is what is looked for
                self.failed.append((function.__name__, config.kwargs | options, str(error)))


def move(value: Any) -> Any:
    """Say of fake tensors that they are on the GPU, and exchange devices."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, FakeTensor):
            leaf.fake_device = DEVICE
    return pytree.tree_map_only(torch.device, lambda _: DEVICE, value)


def move_graph(graph: fx.Graph) -> None:
    """Move all values of a graph."""
    for node in graph.nodes:
        if "val" in node.meta:
            move(node.meta["val"])
        if any(isinstance(x, torch.device) for x in pytree.tree_leaves((node.args, node.kwargs))):
            node.args, node.kwargs = move(node.args), move(node.kwargs)


@contextlib.contextmanager
def gpu_code(kernels: Kernels, show: Callable[[str], None]) -> Iterator[None]:
    """Let the graphs of private steps become code for a GPU that is not there."""
    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.config as config
    import torch._inductor.graph as inductor_graph
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.runtime.triton_heuristics as heuristics
    import torch._inductor.scheduler as scheduler
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton as torch_triton
    import triton

    import flashnorm_compile.graph_pass as graph_pass

    def nothing(*_: Any, **__: Any) -> None:
        return None

    there = [
        mock.patch.object(torch.cuda, name, value)
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "get_device_properties": lambda *_: PROPERTIES,
            "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
            "is_bf16_supported": lambda *_, **__: True,
        }.items()
    ]
    rewrite, compile_inner = graph_pass.make_private, compile_fx._compile_fx_inner

    @contextlib.contextmanager
    def on_the_gpu() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for patch in there:
                stack.enter_context(patch)
            yield

    def rewrite_there(graph: fx.Graph, request: Any) -> Any:
        move_graph(graph)
        with on_the_gpu():
            return rewrite(graph, request)

    def compile_there(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        move_graph(gm.graph)
        gm.recompile()
        move(list(inputs))
        with on_the_gpu():
            return compile_inner(gm, inputs, **options)

    with contextlib.ExitStack() as here:
        for target, name, value in (
            (inductor_graph.GraphLowering, "save_output_code", staticmethod(show)),
            (graph_pass, "make_private", rewrite_there),
            (compile_fx, "_compile_fx_inner", compile_there),
            (heuristics.CachingAutotuner, "precompile", lambda self, *_, **__: kernels.take(self)),
            (helpers, "set_driver_to_gpu", nothing),
            (fake_tensor, "init_gpu_context", nothing),
            (torch_triton, "has_triton", lambda *_: True),
            (scheduler, "has_triton", lambda *_: True),
            (torch.cuda, "_lazy_init", nothing),
            (torch.cuda, "_exchange_device", lambda _: 0),
            (torch.cuda, "_maybe_exchange_device", lambda _: 0),
            (torch.cuda, "set_device", nothing),
            (torch.cuda, "synchronize", nothing),
            (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
            (torch.cuda, "set_rng_state", nothing),
            (torch.cuda, "_get_device_properties", lambda _: PROPERTIES),
        ):
            here.enter_context(mock.patch.object(target, name, value, create=True))
        here.enter_context(
            config.patch(
                shape_padding=False, joint_graph_constant_folding=False, profile_bandwidth=True
            )
        )
        triton.runtime.driver.set_active(Driver())
        yield


def graph_name(code: str) -> str:
    """Return Inductor's name of a graph, such as ``0_backward``."""
    found = re.search(r"AOT ID: \['(\w+)'\]", code)
    assert found is not None
    return found[1]


def table(code: str) -> str:
    """List the kernels of a graph by the memory they move, and its library calls."""
    moved = dict(re.findall(r"'kernel_name': '(\w+)'.*?'kernel_num_gb': ([\d.e+-]+)", code))
    launched = Counter(re.findall(r"^\s+(triton_\w+)\.run\(", code, flags=re.M))
    called = Counter(
        re.findall(r"^\s+(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", code, flags=re.M)
    )
    rows = sorted(
        ((float(moved.get(name, 0)) * count, count, name) for name, count in launched.items()),
        reverse=True,
    )
    total = sum(gigabytes for gigabytes, _, _ in rows)
    lines = [
        f"{graph_name(code)}: {sum(launched.values())} kernels move {total:.2f} GB",
        *(f"{gigabytes:10.3f} GB {count:5d} x {name}" for gigabytes, count, name in rows),
        *(f"{count:19d} x {name}" for name, count in called.most_common()),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if Triton did not compile a kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", default="gpt2-t256-b64", help="a name, see models.py")
    parser.add_argument("--strategy", default="auto", choices=get_args(library.Strategy))
    parser.add_argument("--kernels", default="auto", choices=get_args(library.Kernels))
    parser.add_argument("--compile", action="store_true", help="compile the kernels with Triton")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/gpu-code"))
    options = parser.parse_args(arguments)
    if not torch.backends.cuda.is_built():
        parser.error(f"torch {torch.__version__} is a build without CUDA")
    options.output.mkdir(parents=True, exist_ok=True)
    kernels, codes = Kernels(compile=options.compile), dict[str, str]()

    def show(code: str) -> None:
        codes[graph_name(code)] = code

    workload = find_workload(options.workload)
    method = FlashNorm(
        workload, Settings("cpu"), strategy=options.strategy, kernels=options.kernels
    )
    with gpu_code(kernels, show):
        try:
            method.run()
        except Exception:
            # There is no GPU to run the code on, but by then all of it is there.
            if len(codes) < 2:
                raise
    for name, code in codes.items():
        (options.output / f"{name}.py").write_text(code)
        print(table(code) + "\n")
    print(f"The code is in {options.output}.")
    for name, settings, error in kernels.failed:
        print(f"Triton does not compile {name} with {settings}: {error}", file=sys.stderr)
    if options.compile:
        print(f"Triton compiled {kernels.compiled} kernels, and failed for {len(kernels.failed)}.")
    return int(bool(kernels.failed))


if __name__ == "__main__":
    sys.exit(main())
