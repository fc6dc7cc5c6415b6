"""Cases: embeddings, and weights that are used more than once."""

from __future__ import annotations

import functools

import torch
from driver import Zoo
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo_inputs import cross_entropy, mse, regression, token_cross_entropy, tokens, tokens_to_class

SHARING = Zoo()
VOCAB = 11


class Classifier(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids).tanh().mean(1))


SHARING.add("embedding", Classifier, tokens_to_class(5, VOCAB, 3), cross_entropy)
SHARING.add("embedding_padding_idx", lambda: Classifier(padding_idx=2),
            tokens_to_class(7, VOCAB, 3), cross_entropy)
SHARING.add("embedding_repeated_tokens", Classifier,
            lambda size: (torch.randint(2, (size, 9)), torch.randint(3, (size,))), cross_entropy)
SHARING.add("embedding_one_token", lambda: nn.Embedding(VOCAB, 3),
            lambda size: (torch.randint(VOCAB, (size,)), torch.randint(3, (size,))), cross_entropy)
SHARING.add("embedding_rows_equal_batch", lambda: nn.Embedding(4, 4),
            lambda size: (torch.randint(4, (size, 4)), torch.randint(4, (size, 4))),
            token_cross_entropy)


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, 3))

    def forward(self, ids):
        return self.weight[ids].mean(1)


SHARING.add("indexed_parameter", BagOfWords, tokens_to_class(5, VOCAB, 3), cross_entropy)


class Indexed(nn.Module):
    """A parameter read at places that every sample names, but not as a table of rows."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        shape = (3, VOCAB) if how == "columns" else (VOCAB, 3)
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, ids):
        if self.how == "columns":
            picked = self.weight[:, ids].permute(1, 2, 0)
        elif self.how == "two_indices":
            picked = self.weight[ids, ids % 3]
        else:
            picked = self.weight.gather(0, ids)
        return picked.tanh()


SHARING.add("indexed_columns", lambda: Indexed("columns"), tokens_to_class(5, VOCAB, 3),
            lambda model, ids, labels: F.cross_entropy(model(ids).mean(1), labels))
SHARING.add("indexed_by_two_indices", lambda: Indexed("two_indices"),
            tokens_to_class(5, VOCAB, 5), cross_entropy)
SHARING.add("indexed_by_gather", lambda: Indexed("gather"), tokens_to_class(3, VOCAB, 3),
            cross_entropy)


class TiedHead(nn.Module):
    """The output head is the embedding matrix: ``F.linear(h, emb.weight)``."""

    def __init__(self, *, scale: float = 1.0, padding_idx: int | None = None):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6, padding_idx=padding_idx)
        self.middle = nn.Linear(6, 6)
        self.scale = scale

    def forward(self, ids):
        hidden = self.embedding(ids) * self.scale
        return F.linear(self.middle(hidden).tanh(), self.embedding.weight)


SHARING.add("tied_head", TiedHead, tokens(5, VOCAB), token_cross_entropy)
SHARING.add("tied_head_scaled", lambda: TiedHead(scale=6**0.5), tokens(5, VOCAB),
            token_cross_entropy)
SHARING.add("tied_head_padding_idx", lambda: TiedHead(padding_idx=0), tokens(9, VOCAB),
            token_cross_entropy)


class TiedHeadOfPrompt(nn.Module):
    """Few tokens in, many predictions out: cheapest with only the head's gradients in memory."""

    def __init__(self, *, padding_idx: int | None = None):
        super().__init__()
        self.embedding = nn.Embedding(99, 96, padding_idx=padding_idx)
        self.positions = nn.Parameter(torch.randn(128, 96) / 8)

    def forward(self, ids):
        prompt = self.embedding(ids).sum(1, keepdim=True)
        return F.linear((prompt + self.positions).tanh(), self.embedding.weight)


def prompts(vocabulary: int):
    """Build (ids [N, 2] below ``vocabulary``, labels [N, 128])."""
    return lambda size: (torch.randint(vocabulary, (size, 2)), torch.randint(99, (size, 128)))


SHARING.add("tied_head_of_prompt", TiedHeadOfPrompt, prompts(99), token_cross_entropy)
SHARING.add("tied_head_of_prompt_padding_idx", lambda: TiedHeadOfPrompt(padding_idx=0), prompts(3),
            token_cross_entropy)


class TiedModules(nn.Module):
    """Two modules that hold the same parameter."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6)
        self.head = nn.Linear(6, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids).tanh())


SHARING.add("tied_modules", TiedModules, tokens(5, VOCAB), token_cross_entropy)


class TwoEmbeddings(nn.Module):
    """An encoder and a decoder that share the embedding and the head, at two lengths."""

    def __init__(self, *, tied: bool):
        super().__init__()
        self.shared = nn.Embedding(VOCAB, 6)
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = None if tied else nn.Linear(6, VOCAB)

    def forward(self, source, target):
        memory = self.encoder(self.shared(source)).tanh()
        hidden = self.decoder(self.shared(target)).tanh() + memory.mean(1, keepdim=True)
        return F.linear(hidden, self.shared.weight) if self.head is None else self.head(hidden)


def _sequence_to_sequence(size: int):
    return (
        torch.randint(VOCAB, (size, 7)),
        torch.randint(VOCAB, (size, 5)),
        torch.randint(VOCAB, (size, 5)),
    )


def _sequence_loss(model, source, target, labels):
    return F.cross_entropy(model(source, target).flatten(0, 1), labels.flatten())


SHARING.add("embedding_twice", lambda: TwoEmbeddings(tied=False), _sequence_to_sequence,
            _sequence_loss)
SHARING.add("embedding_twice_and_tied_head", lambda: TwoEmbeddings(tied=True),
            _sequence_to_sequence, _sequence_loss)


class Twice(nn.Module):
    """One layer applied ``times`` times, one after another."""

    def __init__(self, layer: nn.Module, times: int = 2):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return x


SHARING.add("linear_twice", lambda: Twice(nn.Linear(6, 6)), regression(6, targets=(6,)), mse)
SHARING.add("linear_twice_time_axis", lambda: Twice(nn.Linear(6, 6)),
            regression(5, 6, targets=(5, 6)), mse)
SHARING.add("linear_five_times", lambda: Twice(nn.Linear(6, 6), 5),
            regression(5, 6, targets=(5, 6)), mse)
SHARING.add("layer_norm_twice", lambda: Twice(nn.LayerNorm(6)),
            regression(5, 6, targets=(5, 6)), mse)
SHARING.add("conv_twice", lambda: Twice(nn.Conv1d(4, 4, 3, padding=1)),
            regression(4, 7, targets=(4, 7)), mse)
SHARING.add("block_twice",
            lambda: Twice(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))),
            regression(5, 6, targets=(5, 6)), mse)


class TwoLengths(nn.Module):
    """One layer on the full sequence, and on its pooled version."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x).tanh(), self.layer(x.mean(1)).tanh(), self.layer(x[:, :3])


SHARING.add("weight_at_three_lengths", TwoLengths, lambda size: (torch.randn(size, 5, 6),),
            lambda model, x: sum(part.square().mean() for part in model(x)))


class TransposedReuse(nn.Module):
    """An autoencoder with one matrix: W in, its transpose out."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6) / 2)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return (x @ self.weight.T).tanh() @ self.weight + self.bias


SHARING.add("weight_and_its_transpose", TransposedReuse, regression(6, targets=(6,)), mse)
SHARING.add("weight_and_its_transpose_time", TransposedReuse,
            regression(5, 6, targets=(5, 6)), mse)


class SplitWeight(nn.Module):
    """One fused matrix, of which slices are used apart; two of them overlap."""

    def __init__(self, *, overlapping: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 6) / 2)
        self.overlapping = overlapping

    def forward(self, x):
        if self.overlapping:
            return F.linear(x, self.weight[:8]).tanh().sum(-1) + F.linear(
                x, self.weight[4:]).sigmoid().sum(-1)
        q, k, v = self.weight.chunk(3)
        return (F.linear(x, q).tanh() * F.linear(x, k)).sum(-1) + F.linear(x, v).sum(-1)


SHARING.add("disjoint_slices", lambda: SplitWeight(overlapping=False),
            regression(5, 6, targets=(5,)), mse)
SHARING.add("overlapping_slices", lambda: SplitWeight(overlapping=True),
            regression(5, 6, targets=(5,)), mse)


class ConcatenatedWeights(nn.Module):
    """Three parameters concatenated to one projection (fused query, key, value)."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(torch.randn(4, 6) / 2 for _ in range(3))

    def forward(self, x):
        return F.linear(x, torch.cat(list(self.parts)))


SHARING.add("concatenated_weights", ConcatenatedWeights, regression(5, 6, targets=(5, 12)), mse)


class FunctionOfWeight(nn.Module):
    """A weight used through a function of itself, and as it is."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, x):
        return F.linear(F.linear(x, self.function(self.weight)).tanh(), self.weight)


for name, function in {
    "softmax": lambda w: w.softmax(-1),
    "negation": lambda w: -w,
    "difference": lambda w: 0.5 - w,
    "double": lambda w: w + w,
    "reversed_columns": lambda w: w.flip(-1),
    "transposition": lambda w: w.t(),
    "new_shape_of_transposition": lambda w: w.t().reshape(4, 9).t().reshape(6, 6),
}.items():
    SHARING.add(f"weight_through_{name}_and_raw", functools.partial(FunctionOfWeight, function),
                regression(5, 6, targets=(5, 6)), mse)


class RegularisedPart(nn.Module):
    """Two parameters are added up and used as one; a regulariser knows one of them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        shape = {"linear": (4, 6), "conv": (4, 6, 3), "embedding": (VOCAB, 6), "bias": (6,)}[kind]
        self.base = nn.Parameter(torch.randn(shape) / 2)
        self.part = nn.Parameter(torch.randn(shape) / 2)

    def forward(self, x):
        whole = self.base + self.part
        if self.kind == "linear":
            return F.linear(x, whole)
        if self.kind == "conv":
            return F.conv1d(x, whole)
        return F.embedding(x, whole) if self.kind == "embedding" else x + whole


def regularised(model, x):
    return model(x).square().mean() + 0.3 * model.part.sum() + model.part.square().sum()


for kind, inputs in {
    "linear": lambda size: (torch.randn(size, 5, 6),),
    "conv": lambda size: (torch.randn(size, 6, 5),),
    "embedding": lambda size: (torch.randint(VOCAB, (size, 5)),),
    "bias": lambda size: (torch.randn(size, 5, 6),),
}.items():
    SHARING.add(f"regularised_part_of_{kind}", functools.partial(RegularisedPart, kind), inputs,
                regularised)


class PenaltyOnAPart(nn.Module):
    """The weight comes in parts, and one of them is in the penalty alone."""

    def __init__(self, parts):
        super().__init__()
        self.parts, self.weight = parts, nn.Parameter(torch.randn(6, 4) / 2)

    def forward(self, x):
        return x @ self.weight


def penalised_part(model, x):
    first, *_, last = model.parts(model.weight)
    used = x @ (first if first.ndim == 2 else first.unsqueeze(1))
    return used.square().mean() + 3 * last.square().sum()


for name, parts in {
    "chunk_columns": lambda w: w.chunk(2, 1),
    "chunk_last_dim": lambda w: w.chunk(2, -1),
    "split_columns": lambda w: w.split([1, 3], 1),
    "unbind_columns": lambda w: w.unbind(1),
    "slice_columns": lambda w: (w[:, :2], w[:, 2:]),
}.items():
    SHARING.add(f"penalty_on_{name}", functools.partial(PenaltyOnAPart, parts),
                lambda size: (torch.randn(size, 5, 6),), penalised_part)


class LowRankUpdate(nn.Module):
    """LoRA written by hand: the weight and its update are trained."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.randn(6, 6) / 2)
        self.up, self.part = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        return F.linear(x, self.base + self.up @ self.part)


SHARING.add("regularised_low_rank_update", LowRankUpdate, lambda size: (torch.randn(size, 5, 6),),
            regularised)


class Siamese(nn.Module):
    """One encoder on two inputs, with a distance per sample."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, left, right):
        return (self.encoder(left) - self.encoder(right)).square().sum(-1)


SHARING.add("siamese", Siamese, lambda size: (torch.randn(size, 6), torch.randn(size, 6)),
            lambda model, left, right: model(left, right).mean())
SHARING.add("siamese_stacked", Siamese,
            lambda size: (torch.randn(size, 6), torch.randn(size, 6)),
            lambda model, left, right: torch.stack(
                [model.encoder(left), model.encoder(right)]).diff(dim=0).square().mean())


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 6))
            for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


SHARING.add("activation_checkpointing", Checkpointed, regression(5, 6, targets=(5, 6)), mse)


class CellLoop(nn.Module):
    """A hand-written LSTM: the same weights at every time step."""

    def __init__(self):
        super().__init__()
        self.input, self.hidden = nn.Linear(5, 16), nn.Linear(4, 16, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], 4)
        for step in range(x.shape[1]):
            i, f, g, o = (self.input(x[:, step]) + self.hidden(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


SHARING.add("lstm_cell_loop", CellLoop,
            lambda size: (torch.randn(size, 4, 5), torch.randint(3, (size,))), cross_entropy)


class LearnedStart(CellLoop):
    """A vanilla recurrence from a learned first state."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(4))
        self.cell = nn.RNNCell(5, 4)
        del self.input, self.hidden

    def forward(self, x):
        h = self.start.expand(x.shape[0], -1)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        return self.head(h)


SHARING.add("rnn_cell_learned_start", LearnedStart,
            lambda size: (torch.randn(size, 4, 5), torch.randint(3, (size,))), cross_entropy)
