"""Cases: how the model is called and in which precision; constants that look like batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from driver import Zoo
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp
from zoo_inputs import classification, cross_entropy, mse, only_x, regression, squares, tokens
from zoo_losses import uneven_tokens
from zoo_sharing import VOCAB, Checkpointed, TiedHead

CALLS = Zoo()


class DictModel(nn.Module):
    """Takes a nested batch, gives a dictionary."""

    def __init__(self):
        super().__init__()
        self.text, self.image = nn.Embedding(11, 6), nn.Linear(4, 6)

    def forward(self, batch):
        text = self.text(batch["text"]["ids"]).mean(1)
        image = self.image(batch["images"][0] + batch["images"][1])
        return {"joint": text * image, "text": text}


def nested_batch(size: int):
    return {"batch": {
        "text": {"ids": torch.randint(11, (size, 5))},
        "images": (torch.randn(size, 4), torch.randn(size, 4)),
        "label": torch.randint(6, (size,)),
        "name": "not a tensor",
    }}


def nested_loss(model, batch):
    return F.cross_entropy(model(batch)["joint"], batch["label"])


CALLS.add("nested_batch", DictModel, nested_batch, nested_loss)


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, *, features, offset=None, scale: float = 2.0):
        return scale * self.net(features if offset is None else features + offset)


def keyword_loss(model, *, x, y, offset=None):
    return F.cross_entropy(model(features=x, offset=offset), y)


CALLS.add("keyword_only", KeywordOnly,
          lambda size: {"x": torch.randn(size, 6), "y": torch.randint(3, (size,))}, keyword_loss)
CALLS.add("keyword_constant_argument", KeywordOnly,
          lambda size: {"x": torch.randn(size, 6), "y": torch.randint(3, (size,)),
                        "offset": torch.randn(6)},
          keyword_loss, in_dims={"x": 0, "y": 0, "offset": None})


class Output(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor
    extra: list


class TupleOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x).tanh()
        return Output(self.second(hidden), hidden, [x, hidden.mean()])


CALLS.add("named_tuple_output", TupleOutput, classification(6, classes=3),
          lambda m, x, y: F.cross_entropy(m(x).logits, y) + 0.1 * m(x)[1].square().mean())


class ManyArguments(nn.Module):
    """A module called with several tensors by position and keyword, some unused."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, x, z, w, *, flag=True, unused=None):
        return (self.a(x) + self.b(z)).tanh() * w if flag else self.a(x)


CALLS.add("several_arguments", ManyArguments,
          lambda size: (torch.randn(size, 6), torch.randn(size, 4), torch.randn(size, 1)),
          lambda m, x, z, w: m(x, z, w, unused=x).square().mean())


class InPlace(nn.Module):
    """In-place operations on activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        hidden += 1.0
        hidden[:, 0] = 0.0
        hidden.mul_(2.0)
        hidden = F.relu_(hidden)
        return self.second(hidden)


CALLS.add("in_place", InPlace, regression(6, targets=(3,)), mse)


class Detached(nn.Module):
    """A stop-gradient in the middle: the first layer learns from one branch only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.first(x).tanh()
        return self.second(hidden + hidden.detach())


CALLS.add("stop_gradient", Detached, regression(6, targets=(3,)), mse)


class NoGrad(nn.Module):
    """A frozen teacher under ``no_grad`` beside a student."""

    def __init__(self):
        super().__init__()
        self.teacher, self.student = mlp(), mlp()
        self.teacher.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            target = self.teacher(x)
        return (self.student(x) - target).square()


CALLS.add("no_grad_teacher", NoGrad, only_x(6), lambda m, x: m(x).mean())


class ConstantRows(nn.Module):
    """Constants as many as the batch has samples, used along other dims."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("square", torch.randn(4, 4))
        self.register_buffer("row", torch.randn(4))

    def forward(self, x):
        return self.linear(x) @ self.square + self.row


CALLS.add("constants_sized_as_batch", ConstantRows, regression(4, targets=(4,)), mse)


def autocast(loss):
    def inside(model, *batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, *batch)

    return inside


def autocast_tied(model, ids, labels):
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


for _name, (_model, _inputs, _loss) in {
    "mlp": (mlp, classification(6, classes=3), cross_entropy),
    "time_axis": (mlp, regression(5, 6, targets=(5, 3)), mse),
    "tied_head": (TiedHead, tokens(5, VOCAB), autocast_tied),
    "checkpointing": (Checkpointed, regression(5, 6, targets=(5, 6)), mse),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.GELU(),
                                   nn.Conv2d(6, 2, 3)), only_x(3, 7, 7), squares),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
                      only_x(5, 8), squares),
    "uneven_tokens": (TiedHead, uneven_tokens, lambda m, ids, labels: F.cross_entropy(
        m(ids).flatten(0, 1), labels.flatten())),
}.items():
    CALLS.add(f"autocast_{_name}", _model, _inputs, autocast(_loss),
              precision="autocast_bfloat16")


def in_bfloat16(inputs):
    return lambda size: tuple(
        part.bfloat16() if part.is_floating_point() else part for part in inputs(size)
    )


for _name, (_model, _inputs, _loss) in {
    "mlp": (mlp, classification(6, classes=3), cross_entropy),
    "time_axis": (mlp, regression(5, 6, targets=(5, 3)), mse),
    "tied_head": (TiedHead, tokens(5, VOCAB), autocast_tied),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
                   regression(5, 6, targets=(5, 3)), mse),
}.items():
    CALLS.add(f"bfloat16_{_name}", lambda model=_model: model().bfloat16(), in_bfloat16(_inputs),
              _loss, precision="bfloat16")


class MixedDtypes(nn.Module):
    """A float32 norm inside a bfloat16 model."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3).bfloat16()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.last(self.norm(self.first(x).float()).bfloat16())


CALLS.add("bfloat16_with_float32_norm", MixedDtypes, in_bfloat16(regression(6, targets=(3,))), mse,
          precision="bfloat16")
