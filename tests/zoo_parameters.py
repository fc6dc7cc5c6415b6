"""Cases: how a parameter enters the model: scales, scalars, constants, reparametrisations."""

from __future__ import annotations

import peft
import torch
from driver import Zoo
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from zoo_inputs import cross_entropy, mse, only_x, regression, squares, tokens_to_class

PARAMETERS = Zoo()


class Scaled(nn.Module):
    """gamma * x + beta around a linear layer, with parameters of the given shape."""

    def __init__(self, *shape: int):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.randn(shape))
        self.beta = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.gamma * self.linear(x).tanh() + self.beta


for _name, _shape in {
    "scale_and_shift": (6,), "scalar_parameter": (), "one_element_parameter": (1,),
    "scale_over_time": (5, 1), "scale_full": (5, 6), "scale_leading_one": (1, 5, 6),
}.items():
    PARAMETERS.add(_name, lambda shape=_shape: Scaled(*shape),
                   regression(5, 6, targets=(5, 6)), mse)


class Temperature(nn.Module):
    """A 0-d parameter that divides the logits, and one used as a power."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.log_temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.linear(x) / self.log_temperature.exp()


PARAMETERS.add("temperature", Temperature,
               lambda size: (torch.randn(size, 6), torch.randint(3, (size,))), cross_entropy)
PARAMETERS.add("only_a_scalar", lambda: nn.ParameterDict({"a": torch.tensor(0.7)}),
               regression(targets=()), lambda m, x, y: F.mse_loss(m["a"] * x, y))


class PartlyFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.norm, self.free = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.frozen.requires_grad_(False)
        self.norm.weight.requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x):
        return self.free(self.norm(self.frozen(x + self.shift)).tanh())


PARAMETERS.add("frozen_and_unused", PartlyFrozen, regression(6, targets=(3,)), mse)


def bias_only() -> nn.Module:
    """BitFit: only biases are trained."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith("bias"))
    return model


PARAMETERS.add("bias_only", bias_only, regression(5, 6, targets=(5, 3)), mse)


class Buffers(nn.Module):
    """Buffers as factors, and as a fixed random projection."""

    def __init__(self):
        super().__init__()
        self.register_buffer("projection", torch.randn(6, 5))
        self.register_buffer("scale", torch.rand(5))
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear((x @ self.projection) * self.scale)


PARAMETERS.add("buffers", Buffers, regression(6, targets=(3,)), mse)


def with_parametrization(wrap) -> nn.Module:
    return nn.Sequential(wrap(nn.Linear(6, 8)), nn.Tanh(), wrap(nn.Linear(8, 3)))


PARAMETERS.add("weight_norm", lambda: with_parametrization(parametrizations.weight_norm),
               regression(5, 6, targets=(5, 3)), mse)
PARAMETERS.add("weight_norm_conv",
               lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), nn.Tanh(),
                                     nn.Conv1d(6, 2, 1)),
               only_x(4, 9), squares)
PARAMETERS.add("weight_norm_hook",
               lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 3)),
               regression(6, targets=(3,)), mse)
PARAMETERS.add("spectral_norm_eval",
               lambda: with_parametrization(parametrizations.spectral_norm).eval(),
               regression(5, 6, targets=(5, 3)), mse)
PARAMETERS.add("spectral_norm_train", lambda: with_parametrization(parametrizations.spectral_norm),
               regression(5, 6, targets=(5, 3)), mse)


def orthogonal(layer: nn.Module, **options) -> nn.Module:
    """Make the weight orthogonal, and move it away from where the parametrization starts."""
    layer = parametrizations.orthogonal(layer, **options)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        # The diagonal is left alone: one of the maps takes its signs.
        original += 0.3 * torch.randn_like(original) * (1 - torch.eye(*original.shape[-2:]))
    return layer


for _map in ("householder", "matrix_exp", "cayley"):
    PARAMETERS.add(f"orthogonal_{_map}",
                   lambda which=_map: with_parametrization(
                       lambda layer: orthogonal(layer, orthogonal_map=which)),
                   regression(5, 6, targets=(5, 3)), mse)
    PARAMETERS.add(f"orthogonal_square_{_map}",
                   lambda which=_map: nn.Sequential(
                       orthogonal(nn.Linear(4, 4), orthogonal_map=which), nn.Tanh(),
                       nn.Linear(4, 3)),
                   regression(4, targets=(3,)), mse)
    # Weights [6, 4, 3]: one matrix per filter.
    PARAMETERS.add(f"orthogonal_conv_{_map}",
                   lambda which=_map: nn.Sequential(
                       orthogonal(nn.Conv1d(4, 6, 3), orthogonal_map=which), nn.Tanh(),
                       nn.Conv1d(6, 2, 1)),
                   only_x(4, 9), squares)
    # Without a base, the first keeps its parameter as QR gives it, column by column.
    PARAMETERS.add(f"orthogonal_no_base_{_map}",
                   lambda which=_map: nn.Sequential(
                       orthogonal(nn.Linear(6, 8), orthogonal_map=which,
                                  use_trivialization=False), nn.Tanh(),
                       nn.Linear(8, 3)),
                   regression(5, 6, targets=(5, 3)), mse)


class Inverse(nn.Module):
    """An inverse, which is checked, or the solution of triangular equations, which is not."""

    def __init__(self, *, triangular: bool):
        super().__init__()
        self.triangular = triangular

    def forward(self, weight):
        if self.triangular:
            return torch.linalg.solve_triangular(weight.tril(-1), weight, upper=False,
                                                 unitriangular=True)
        return torch.linalg.inv(weight + 3 * torch.eye(len(weight), device=weight.device))


def inverse_of_weight(*, triangular: bool) -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Inverse(triangular=triangular))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


PARAMETERS.add("inverse_of_weight", lambda: inverse_of_weight(triangular=False),
               regression(5, 6, targets=(5, 3)), mse)
PARAMETERS.add("triangular_solve_of_weight", lambda: inverse_of_weight(triangular=True),
               regression(5, 6, targets=(5, 3)), mse)
PARAMETERS.add("channels_last_weight",
               lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).to(
                   memory_format=torch.channels_last),
               only_x(3, 7, 7), squares)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def symmetric() -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


PARAMETERS.add("symmetric_weight", symmetric, regression(5, 6, targets=(5, 3)), mse)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: each filter has mean 0 and variance 1."""

    def forward(self, x):
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
        return F.conv2d(x, weight.view_as(self.weight), self.bias)


PARAMETERS.add("weight_standardisation",
               lambda: nn.Sequential(StandardisedConv(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(),
                                     StandardisedConv(4, 2, 3)),
               only_x(3, 6, 6), squares)


class QuantisedWeight(nn.Module):
    """Straight-through rounding of the weight (quantisation-aware training)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        weight = self.linear.weight
        rounded = weight + ((weight * 8).round() / 8 - weight).detach()
        return F.linear(x, rounded, self.linear.bias)


PARAMETERS.add("quantised_weight", QuantisedWeight, regression(5, 6, targets=(5, 3)), mse)


class Selected(nn.Module):
    """Parameter rows picked by constant indices, some of them twice."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.table = nn.Parameter(torch.randn(7, 6))
        self.linear = nn.Linear(6, 3)
        self.register_buffer("rows", torch.tensor([1, 3, 3, 0, 6]))

    def forward(self, x):
        if self.how == "index_select":
            picked = self.table.index_select(0, self.rows)
        elif self.how == "gather":
            picked = self.table.gather(0, self.rows[:, None].expand(-1, 6))
        else:
            picked = self.table[self.rows]
        return self.linear((x + picked).tanh())


for _how in ("index_select", "gather", "indexing"):
    PARAMETERS.add(f"parameter_by_{_how}", lambda how=_how: Selected(how),
                   regression(5, 6, targets=(5, 3)), mse)


class MaskedWeight(nn.Module):
    """A pruned layer: the weight times a constant mask; and one cut by triu."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("mask", (torch.rand(6, 6) > 0.5).float())

    def forward(self, x):
        hidden = F.linear(x, self.first.weight * self.mask, self.first.bias).tanh()
        return F.linear(hidden, self.second.weight.tril())


PARAMETERS.add("masked_weight", MaskedWeight, regression(5, 6, targets=(5, 6)), mse)


class LowRank(nn.Module):
    """LoRA merged in the weight: W + B A, before the product with x."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6) / 2), nn.Parameter(torch.randn(5, 2) / 2)

    def forward(self, x):
        return F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)


PARAMETERS.add("low_rank_merged", LowRank, regression(5, 6, targets=(5, 5)), mse)


class SmallModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head((x + self.fc2(self.fc1(x).relu())).mean(1))


def peft_model(**options) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_dropout=0.0, init_lora_weights=False, **options)
    return peft.get_peft_model(SmallModel(), config)


for _name, _options in {
    "peft_lora": {"target_modules": ["fc1", "fc2"]},
    "peft_lora_and_trained_head": {"target_modules": ["fc1"], "modules_to_save": ["head"]},
    "peft_lora_embedding": {"target_modules": ["embedding", "fc1"]},
    "peft_lora_rank_stabilised": {"target_modules": ["fc1", "fc2"], "use_rslora": True},
}.items():
    PARAMETERS.add(_name, lambda options=_options: peft_model(**options),
                   tokens_to_class(5, 11, 3), cross_entropy)
