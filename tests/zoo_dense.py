"""Cases: linear layers, normalisation, activations, einsum, and layouts."""

from __future__ import annotations

import torch
from driver import Zoo
from torch import nn
from torch.nn import functional as F
from zoo_inputs import classification, cross_entropy, mse, only_x, regression, squares

DENSE = Zoo()


def mlp(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))


DENSE.add("mlp", mlp, classification(6, classes=3), cross_entropy)
DENSE.add("mlp_no_bias", lambda: mlp(bias=False), classification(6, classes=3), cross_entropy)
DENSE.add("mlp_time_axis", mlp, regression(5, 6, targets=(5, 3)), mse)
DENSE.add("mlp_four_dims", mlp, regression(2, 5, 6, targets=(2, 5, 3)), mse)
DENSE.add("mlp_five_dims", mlp, regression(2, 3, 5, 6, targets=(2, 3, 5, 3)), mse)
DENSE.add("one_linear", lambda: nn.Linear(6, 3), regression(6, targets=(3,)), mse)
DENSE.add("one_output", lambda: nn.Linear(6, 1), regression(6, targets=(1,)), mse)
DENSE.add("one_feature", lambda: nn.Linear(1, 3), regression(1, targets=(3,)), mse)
DENSE.add("mlp_long_time", mlp, regression(40, 6, targets=(40, 3)), mse)
DENSE.add("dims_equal_batch", lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
          regression(4, targets=(4,)), mse)
DENSE.add("dims_and_time_equal_batch",
          lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
          regression(4, 4, targets=(4, 4)), mse)

for _name, _norm in {
    "layer_norm": lambda: nn.LayerNorm(8),
    "layer_norm_no_bias": lambda: nn.LayerNorm(8, bias=False),
    "rms_norm": lambda: nn.RMSNorm(8),
}.items():
    DENSE.add(_name,
              lambda norm=_norm: nn.Sequential(nn.Linear(6, 8), norm(), nn.Linear(8, 3)),
              regression(5, 6, targets=(5, 3)), mse)
DENSE.add("layer_norm_two_dims",
          lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm((5, 8)), nn.Linear(8, 3)),
          regression(5, 6, targets=(5, 3)), mse)
DENSE.add("group_norm",
          lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv1d(6, 2, 1)),
          only_x(3, 9), squares)
DENSE.add("instance_norm",
          lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.InstanceNorm1d(6, affine=True),
                                nn.Tanh(), nn.Conv1d(6, 2, 3)),
          only_x(3, 9), squares)
DENSE.add("instance_norm_2d",
          lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True),
                                nn.Tanh(), nn.Conv2d(4, 2, 3)),
          only_x(3, 7, 7), squares)
DENSE.add("batch_norm_eval",
          lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval(),
          regression(6, targets=(3,)), mse)
DENSE.add("prelu", lambda: nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 3)),
          regression(6, targets=(3,)), mse)
DENSE.add("prelu_channels",
          lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.PReLU(6), nn.Conv1d(6, 2, 1)),
          only_x(3, 9), squares)
DENSE.add("glu", lambda: nn.Sequential(nn.Linear(6, 8), nn.GLU(), nn.Linear(4, 3)),
          regression(5, 6, targets=(5, 3)), mse)


class SwiGlu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.down = nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


DENSE.add("swiglu", SwiGlu, regression(5, 6, targets=(5, 6)), mse)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return x


DENSE.add("residual", Residual, regression(5, 6, targets=(5, 6)), mse)


class Bilinear(nn.Module):
    def __init__(self, *, bias: bool = True):
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 5)
        self.bilinear = nn.Bilinear(4, 5, 3, bias=bias)

    def forward(self, x):
        return self.bilinear(self.left(x), self.right(x))


DENSE.add("bilinear", Bilinear, regression(6, targets=(3,)), mse)
DENSE.add("bilinear_no_bias", lambda: Bilinear(bias=False), regression(6, targets=(3,)), mse)
DENSE.add("bilinear_time_axis", Bilinear, regression(5, 6, targets=(5, 3)), mse)
DENSE.add("bilinear_time_first", Bilinear,
          lambda size: {"x": torch.randn(5, size, 6), "y": torch.randn(5, size, 3)},
          mse, in_dims={"x": 1, "y": 1})
DENSE.add("bilinear_of_two_inputs", lambda: nn.Bilinear(4, 4, 4),
          lambda size: (torch.randn(size, 4), torch.randn(size, 4)),
          lambda model, x, y: model(x, y).square().mean())


class BilinearAttention(nn.Module):
    """Scores every step against a learned query; the weight serves twice, once symmetrically."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(6))
        self.weight = nn.Parameter(torch.randn(2, 6, 6) / 3)

    def forward(self, x):
        scores = F.bilinear(x, self.query.expand_as(x), self.weight)
        return scores.softmax(-2) + F.bilinear(x, x, self.weight)


DENSE.add("bilinear_query_and_shared_weight", BilinearAttention,
          regression(5, 6, targets=(5, 2)), mse)


class Einsum(nn.Module):
    """Heads as a parameter dim: [B, T, d] x [h, d, k] -> [B, h, T, k] -> [B, T, d]."""

    def __init__(self):
        super().__init__()
        self.into = nn.Parameter(torch.randn(2, 6, 5) / 3)
        self.out = nn.Parameter(torch.randn(2, 5, 6) / 3)
        self.bias = nn.Parameter(torch.randn(2, 1, 5) / 3)

    def forward(self, x):
        hidden = torch.einsum("btd,hdk->bhtk", x, self.into) + self.bias
        return torch.einsum("bhtk,hkd->btd", hidden.tanh(), self.out)


DENSE.add("einsum_heads", Einsum, regression(5, 6, targets=(5, 6)), mse)


class EinsumOverTime(nn.Module):
    """Mixes time steps with a [T, T] parameter, as MLP-Mixer does."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 5) / 2)
        self.channels = nn.Linear(6, 6)

    def forward(self, x):
        mixed = torch.einsum("st,btd->bsd", self.mix, x)
        return self.channels(mixed.tanh())


DENSE.add("mixer_time_matrix", EinsumOverTime, regression(5, 6, targets=(5, 6)), mse)


class MatmulTransposed(nn.Module):
    """The same product written with `@`, `.T`, `baddbmm` and `addmm`."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 6) / 3)
        self.b = nn.Parameter(torch.randn(2, 8, 4) / 3)
        self.c = nn.Parameter(torch.randn(4) / 3)

    def forward(self, x):
        hidden = (x @ self.a.T).tanh()
        pair = torch.stack([hidden @ self.b[0], hidden @ self.b[1]])
        return torch.addmm(self.c, pair.sum(0), x.new_ones(4, 4))


DENSE.add("matmul_spellings", MatmulTransposed, regression(6, targets=(4,)), mse)


class Experts(nn.Module):
    """Every sample goes through every expert, gated by its own softmax (no routing)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.weight = nn.Parameter(torch.randn(3, 6, 5) / 3)

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        outputs = torch.matmul(x.unsqueeze(0), self.weight)
        return torch.einsum("be,ebk->bk", gates, outputs)


DENSE.add("dense_experts", Experts, regression(6, targets=(5,)), mse)


class HyperNetwork(nn.Module):
    """A layer whose weights are computed from the sample, applied with bmm."""

    def __init__(self):
        super().__init__()
        self.make, self.out = nn.Linear(6, 5 * 4), nn.Linear(4, 3)

    def forward(self, x, h):
        weight = self.make(x).unflatten(-1, (5, 4))
        return self.out(torch.bmm(h, weight).tanh())


DENSE.add("hypernetwork_bmm", HyperNetwork,
          lambda size: (torch.randn(size, 6), torch.randn(size, 7, 5)),
          lambda model, x, h: model(x, h).square().mean())


class TimeFirst(nn.Module):
    """Works on [T, B, d] throughout."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.randn(5, 1, 6))

    def forward(self, x):
        return self.last(self.norm(self.first(x + self.position)).tanh())


DENSE.add("time_first", TimeFirst,
          lambda size: {"x": torch.randn(5, size, 6), "y": torch.randn(5, size, 3)},
          mse, in_dims={"x": 1, "y": 1})
DENSE.add("time_first_label_per_sample", TimeFirst,
          lambda size: {"x": torch.randn(5, size, 6), "y": torch.randint(3, (size,))},
          lambda model, x, y: F.cross_entropy(model(x).mean(0), y),
          in_dims={"x": 1, "y": 0})
DENSE.add("time_first_size_equal_batch", TimeFirst,
          lambda size: {"x": torch.randn(5, size, 6), "y": torch.randn(5, size, 3)},
          mse, in_dims={"x": 1, "y": 1}, batch_size=5)


class TransposedInside(TimeFirst):
    """Takes [B, T, d] and works on [T, B, d]."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


DENSE.add("transposed_inside", TransposedInside, regression(5, 6, targets=(5, 3)), mse)


class BatchLast(nn.Module):
    """Columns are samples: [d, B]."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 6) / 3), nn.Parameter(torch.randn(3, 8) / 3)
        self.c = nn.Parameter(torch.randn(3, 1))

    def forward(self, x):
        return self.b @ (self.a @ x).tanh() + self.c


DENSE.add("batch_last", BatchLast,
          lambda size: {"x": torch.randn(6, size), "y": torch.randn(3, size)},
          mse, in_dims={"x": 1, "y": 1})
