"""The analysis on joint forward and backward graphs of small models, against experiments.

Where samples first meet must be the loss's own sums and the gradients of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from perturbation import batched, check_graph
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from flashnorm_compile.passes.batch_axis import Analysis, Constant, Mixed

B, T, D = 3, 3, 6


@dataclass
class Joint:
    """A joint graph with real inputs for it."""

    gm: Any = None
    inputs: list[Any] = field(default_factory=list)
    outputs: int = 0


def capture(
    step: Callable[..., torch.Tensor], args: Sequence[torch.Tensor], **options: Any
) -> Joint:
    """Compile a step that returns a loss, and keep its joint graph."""
    joint = Joint()

    def partition(gm: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        joint.gm, joint.outputs = fx.GraphModule(gm, graph), num_fwd_outputs
        return min_cut_rematerialization_partition(
            gm, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs
        )

    compiler = aot_autograd(
        fw_compiler=lambda gm, _: gm,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        compiled = compiler(gm, example_inputs)

        def run(*inputs: Any) -> Any:
            joint.inputs = list(inputs)
            return compiled(*inputs)

        return run

    torch._dynamo.reset()
    torch.compile(step, backend=backend, fullgraph=True, **options)(*args)
    return joint


def analyze_step(
    step: Callable[..., torch.Tensor], args: Sequence[torch.Tensor], **options: Any
) -> tuple[Joint, Analysis]:
    """Analyze and perturb the joint graph of a step whose arguments have the batch first."""
    joint = capture(step, args, **options)
    nodes = [node for node in joint.gm.graph.nodes if node.op == "placeholder"]
    tangents = [node for node in nodes if node.name.startswith("tangents")]
    (output,) = (node for node in joint.gm.graph.nodes if node.op == "output")
    ours = {arg.data_ptr() for arg in args}
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in joint.inputs]
    seeds = [
        batched(0) if isinstance(x, torch.Tensor) and x.data_ptr() in ours else Constant()
        for x in inputs
    ]
    floating = [n for n in output.args[0][: joint.outputs] if n.meta["val"].is_floating_point()]
    ones = [torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in tangents]
    # Overwritten buffers come before the step's own outputs, and have no tangents.
    tangent_of = dict(zip(tangents, floating[-len(tangents) :], strict=True))
    analysis = check_graph(joint.gm, [*inputs, *ones], seeds, batch=B, tangent_of=tangent_of)
    return joint, analysis


def meeting_points(joint: Joint, analysis: Analysis) -> dict[str, set[str]]:
    """Return where samples first meet, by op: in the loss, and in gradients."""
    (output,) = (node for node in joint.gm.graph.nodes if node.op == "output")
    found: dict[str, set[str]] = {"loss": set(), "gradients": set()}
    for position, node in enumerate(output.args[0]):
        value = analysis[node] if node is not None else None
        if isinstance(value, Mixed):
            part = "loss" if position < joint.outputs else "gradients"
            found[part].add(value.origin.target.__name__.split(".")[0])
    return found


def origins(joint: Joint, analysis: Analysis) -> set[str]:
    """Return the ops where samples first meet, anywhere in the graph."""
    values = [v for value in analysis.values.values() for v in flat(value)]
    return {v.origin.target.__name__.split(".")[0] for v in values if isinstance(v, Mixed)}


def flat(value: Any) -> list[Any]:
    return [v for item in value for v in flat(item)] if isinstance(value, tuple) else [value]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 3, d // 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, t, d))


class Decoder(nn.Module):
    """Token and position embeddings, attention, a tied head, a token mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(7, D), nn.Embedding(T, D)
        self.block = Attention()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        logits = F.dropout(self.block(h), 0.1) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=0)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = F.max_pool2d(F.gelu(self.norm(self.conv1(x))), 2)
        h = F.adaptive_avg_pool2d(F.relu(self.conv2(h)), 1).flatten(1)
        return F.cross_entropy(self.head(h), y)


class Recurrent(nn.Module):
    """An LSTM cell in a loop, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(D, D), nn.Linear(D, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], D)
        states = []
        for step in x.transpose(0, 1):
            h, c = self.cell(step, (h, c))
            states.append(h)
        return self.head(torch.stack(states)).square().sum((0, 2)).mean()


class Scan(nn.Module):
    """A selective scan written with cumulative sums, and a causal depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 2, groups=D, padding=1)
        self.gate, self.log_a = nn.Linear(D, D), nn.Parameter(torch.zeros(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = F.silu(self.conv(x.mT)[..., : x.shape[1]]).mT
        decay = (-F.softplus(self.gate(u)) * self.log_a.exp()).cumsum(1)
        h = (u * (-decay).exp()).cumsum(1) * decay.exp()
        return F.rms_norm(h, (D,)).logsumexp((1, 2)).mean()


class Picker(nn.Module):
    """Reads one position per sample, as CLIP and classifiers over GPT do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, D), nn.Linear(D, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        last = tokens.argmax(1)
        picked = h[torch.arange(tokens.shape[0]), last]
        return self.head(picked).log_softmax(-1)[:, 0].sum()


tokens = torch.randint(1, 7, (B, T), generator=torch.Generator().manual_seed(3))
vectors = torch.randn(B, T, D)
images, labels = torch.randn(B, 3, 8, 8), torch.tensor([0, 2, 1])
EMBEDDING = {"_unsafe_masked_index_put_accumulate", "index_put"}
GRADIENT_SITES = {"mm", "sum", "convolution_backward"} | EMBEDDING

MODELS = [
    (Decoder, (tokens,), {"mm", "sum"} | EMBEDDING),
    (ConvNet, (images, labels), {"mm", "sum", "convolution_backward"}),
    (Recurrent, (vectors,), {"mm", "sum"}),
    (Scan, (vectors,), {"mm", "sum", "convolution_backward"}),
    (Picker, (tokens,), {"mm", "sum"} | EMBEDDING),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("model", "args", "sites"), MODELS)
def test_samples_meet_in_the_loss_and_in_gradients_only(
    model: type[nn.Module], args: tuple[torch.Tensor, ...], sites: set[str], dynamic: bool
) -> None:
    torch.manual_seed(0)
    module = model()
    if dynamic:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
    args = tuple(arg.clone() for arg in args) if not dynamic else args
    joint, analysis = analyze_step(module, args)
    found = meeting_points(joint, analysis)
    assert found["loss"] <= {"sum", "mean"}
    assert found["gradients"]
    assert found["gradients"] <= sites
    assert origins(joint, analysis) <= sites | {"mean"}


class Mixing(nn.Module):
    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.mix = nn.Linear(D, D), nn.Linear(D, 1), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.mix(self.first(x))).sum()


MIXES: list[tuple[Callable, str]] = [
    (
        lambda h: F.batch_norm(h, None, None, training=True),
        "takes the variance over the batch axis",
    ),
    (lambda h: h - h.mean(0), "averages over the batch axis"),
    (lambda h: h @ (h.T @ h), "contracts the batch axis"),
    (lambda h: (h @ h.T) @ h, "compares every sample with every other"),
    (lambda h: h.softmax(0), "takes the maximum over the batch axis"),
    (lambda h: 0.5 * h + 0.5 * h.flip(0), "reverses the batch axis"),
    (lambda h: h + h.roll(1, 0), "gathers across samples"),
    (lambda h: h[torch.arange(B).neg() + B - 1], "gathers across samples"),
    (lambda h: h + h[:, :2].mT.reshape(B, 2)[:, :1], "scrambles the batch axis"),
]


@pytest.mark.parametrize(("mix", "reason"), MIXES)
def test_mixing_samples_is_found(mix: Callable, reason: str) -> None:
    _, analysis = analyze_step(Mixing(mix), (torch.randn(B, D),))
    values = [v for value in analysis.values.values() for v in flat(value)]
    reasons = {v.reason for v in values if isinstance(v, Mixed)}
    assert any(found.startswith(reason) for found in reasons), reasons


def tiny_mamba(transformers: Any) -> tuple[nn.Module, Callable, tuple]:
    config = transformers.MambaConfig(
        hidden_size=6, num_hidden_layers=1, vocab_size=9, state_size=3
    )
    model = transformers.MambaForCausalLM(config)
    return model, lambda i: model(input_ids=i).logits, (tokens,)


def tiny_swin(transformers: Any) -> tuple[nn.Module, Callable, tuple]:
    config = transformers.SwinConfig(
        image_size=8, patch_size=2, embed_dim=6, depths=[2], num_heads=[3], window_size=2
    )
    model = transformers.SwinForImageClassification(config)
    return model, lambda p: model(pixel_values=p).logits, (images,)


@pytest.mark.parametrize("build", [tiny_mamba, tiny_swin])
def test_transformers(build: Callable) -> None:
    torch.manual_seed(0)
    _, logits, args = build(pytest.importorskip("transformers"))
    joint, analysis = analyze_step(lambda x: logits(x).logsumexp(-1).mean(), args)
    assert meeting_points(joint, analysis)["gradients"]
    assert origins(joint, analysis) <= GRADIENT_SITES | {"mean"}
