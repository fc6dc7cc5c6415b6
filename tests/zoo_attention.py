"""Cases: attention, position embeddings, learned queries, prefixes."""

from __future__ import annotations

import torch
from driver import Zoo
from torch import nn
from torch.nn import functional as F
from zoo_inputs import cross_entropy, mse, only_x, regression, squares, token_cross_entropy, tokens

ATTENTION = Zoo()


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x, **options):
        return self.attention(x, x, x, need_weights=False, **options)[0]


ATTENTION.add("multihead_attention", lambda: SelfAttention(batch_first=True), only_x(5, 8), squares)
ATTENTION.add("multihead_attention_weights_needed",
              lambda: nn.MultiheadAttention(8, 2, batch_first=True), only_x(5, 8),
              lambda model, x: model(x, x, x)[0].square().mean())
ATTENTION.add("multihead_attention_cross",
              lambda: nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6),
              lambda size: (torch.randn(size, 5, 8), torch.randn(size, 7, 6)),
              lambda model, x, m: model(x, m, m, need_weights=False)[0].square().mean())
ATTENTION.add("multihead_attention_time_first", SelfAttention,
              lambda size: {"x": torch.randn(5, size, 8), "y": torch.randn(5, size, 8)},
              mse, in_dims={"x": 1, "y": 1})
ATTENTION.add("multihead_attention_transposed", SelfAttention, only_x(5, 8),
              lambda model, x: model(x.transpose(0, 1)).square().mean())
ATTENTION.add(
    "multihead_attention_padding_mask", lambda: SelfAttention(batch_first=True),
    lambda size: (torch.randn(size, 6, 8), torch.arange(size) % 4 + 3),
    lambda model, x, lengths: model(
        x, key_padding_mask=torch.arange(6, device=x.device) >= lengths[:, None]).square().mean())


class FusedAttention(nn.Module):
    """Fused projections and ``scaled_dot_product_attention``."""

    def __init__(self, *, causal: bool, masked: bool = False):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.causal, self.masked = causal, masked

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        length = x.shape[1]
        mask = x.new_ones(length, length, dtype=torch.bool).tril() if self.masked else None
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


ATTENTION.add("sdpa", lambda: FusedAttention(causal=False), only_x(5, 8), squares)
ATTENTION.add("sdpa_causal", lambda: FusedAttention(causal=True), only_x(5, 8), squares)
ATTENTION.add("sdpa_constant_mask", lambda: FusedAttention(causal=False, masked=True),
              only_x(5, 8), squares)
ATTENTION.add("sdpa_sizes_equal_batch", lambda: FusedAttention(causal=True), only_x(4, 8), squares)


class GroupedQuery(nn.Module):
    """Fewer key and value heads than query heads, repeated."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x):
        query = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        key, value = self.kv(x).unflatten(-1, (2, 1, 2)).permute(2, 0, 3, 1, 4)
        key, value = key.repeat_interleave(4, 1), value.expand(-1, 4, -1, -1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


ATTENTION.add("grouped_query_attention", GroupedQuery, only_x(5, 8), squares)


def encoder_layer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options)


ATTENTION.add("encoder_layer", lambda: encoder_layer(batch_first=True), only_x(5, 8), squares)
ATTENTION.add("encoder_layer_norm_first",
              lambda: encoder_layer(batch_first=True, norm_first=True, activation="gelu"),
              only_x(5, 8), squares)
ATTENTION.add("encoder_layer_time_first", encoder_layer,
              lambda size: {"x": torch.randn(5, size, 8), "y": torch.randn(5, size, 8)},
              mse, in_dims={"x": 1, "y": 1})
ATTENTION.add("decoder_layer",
              lambda: nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
              lambda size: (torch.randn(size, 5, 8), torch.randn(size, 7, 8)),
              lambda model, x, memory: model(x, memory).square().mean())


class Positions(nn.Module):
    """Positions by a broadcast parameter, by an embedding of arange, or by a buffer of ids."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        if kind == "parameter":
            self.positions = nn.Parameter(torch.randn(1, 9, 6))
        else:
            self.positions = nn.Embedding(9, 6)
            self.register_buffer("position_ids", torch.arange(9)[None])

    def forward(self, ids):
        length = ids.shape[1]
        if self.kind == "parameter":
            positions = self.positions[:, :length]
        elif self.kind == "arange":
            positions = self.positions(torch.arange(length, device=ids.device))
        elif self.kind == "buffer":
            positions = self.positions(self.position_ids[:, :length])
        else:
            places = torch.arange(length, device=ids.device)
            positions = self.positions(places[None].expand(ids.shape[0], -1))
        return self.head((self.words(ids) + positions).tanh())


for _kind in ("parameter", "arange", "buffer", "expanded"):
    ATTENTION.add(f"positions_{_kind}", lambda kind=_kind: Positions(kind), tokens(5, 11),
                  token_cross_entropy)
ATTENTION.add("positions_length_equal_batch", lambda: Positions("arange"), tokens(4, 11),
              token_cross_entropy)


class PositionsFromMask(Positions):
    """Position ids counted from each sample's own mask."""

    def __init__(self):
        super().__init__("arange")

    def forward(self, ids):
        counted = (ids != 0).long().cumsum(1).clamp(max=8)
        return self.head((self.words(ids) + self.positions(counted)).tanh())


ATTENTION.add("positions_from_data", PositionsFromMask,
              lambda size: (torch.randint(0, 3, (size, 7)), torch.randint(11, (size, 7))),
              token_cross_entropy)


class RotaryAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qk, self.v = nn.Linear(8, 16, bias=False), nn.Linear(8, 8, bias=False)
        angles = torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def rotate(self, x):
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return x * self.cos[: x.shape[-2]] + turned * self.sin[: x.shape[-2]]

    def forward(self, x):
        query, key = self.qk(x).chunk(2, -1)
        scores = self.rotate(query) @ self.rotate(key).transpose(-1, -2) / 8**0.5
        return scores.softmax(-1) @ self.v(x)


ATTENTION.add("rotary_attention", RotaryAttention, only_x(5, 8), squares)


class ClassToken(nn.Module):
    """A parameter expanded to the batch and put in front, as in a vision transformer."""

    def __init__(self, *, repeat: bool):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        self.layer, self.head = encoder_layer(batch_first=True), nn.Linear(8, 3)
        self.repeat = repeat

    def forward(self, x):
        size = x.shape[0]
        token = self.token.repeat(size, 1, 1) if self.repeat else self.token.expand(size, -1, -1)
        return self.head(self.layer(torch.cat([token, x], 1) + self.positions)[:, 0])


for _repeat in (False, True):
    ATTENTION.add(f"class_token_{'repeat' if _repeat else 'expand'}",
                  lambda repeat=_repeat: ClassToken(repeat=repeat),
                  lambda size: (torch.randn(size, 5, 8), torch.randint(3, (size,))), cross_entropy)


class LearnedQueries(nn.Module):
    """Queries are parameters, keys and values come from the sample (Perceiver, DETR)."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.kv, self.head = nn.Linear(8, 16), nn.Linear(8, 2)

    def forward(self, x):
        key, value = self.kv(x).chunk(2, -1)
        weights = (self.queries @ key.transpose(1, 2) / 8**0.5).softmax(-1)
        return self.head(weights @ value)


ATTENTION.add("learned_queries", LearnedQueries, regression(5, 8, targets=(3, 2)), mse)


class Prefix(nn.Module):
    """Prefix tuning: learned keys and values in front of the sample's own, the rest frozen."""

    def __init__(self):
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(2, 3, 8))
        self.layer = FusedAttention(causal=False)
        self.layer.requires_grad_(False)

    def forward(self, x):
        query, key, value = self.layer.qkv(x).chunk(3, -1)
        more_keys, more_values = self.prefix[:, None].expand(-1, x.shape[0], -1, -1).unbind(0)
        key, value = torch.cat([more_keys, key], 1), torch.cat([more_values, value], 1)
        return self.layer.out(F.scaled_dot_product_attention(query, key, value))


class Prompt(nn.Module):
    """Prompt tuning: learned embeddings in front of the input of a frozen model."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(2, 8))
        self.layer = encoder_layer(batch_first=True)
        self.layer.requires_grad_(False)

    def forward(self, x):
        prompt = self.prompt[None].expand(x.shape[0], -1, -1)
        return self.layer(torch.cat([prompt, x], 1))[:, 2:]


ATTENTION.add("prefix_tuning", Prefix, regression(5, 8, targets=(5, 8)), mse)
ATTENTION.add("prompt_tuning", Prompt, regression(5, 8, targets=(5, 8)), mse)


class RelativeBias(nn.Module):
    """A learned bias per head and bucket of distance, as in T5."""

    def __init__(self):
        super().__init__()
        self.bias, self.qkv = nn.Embedding(7, 2), nn.Linear(8, 24)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        bias = self.bias((places[:, None] - places[None]).clamp(-3, 3) + 3).permute(2, 0, 1)[None]
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) + bias
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


ATTENTION.add("relative_position_bias", RelativeBias, only_x(5, 8), squares)


class LinearAttention(nn.Module):
    """Linear attention: the state is a per-sample outer product, no softmax."""

    def __init__(self):
        super().__init__()
        self.qkv, self.decay = nn.Linear(8, 24), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        state = x.new_zeros(x.shape[0], 8, 8)
        outputs = []
        for step in range(x.shape[1]):
            state = self.decay.sigmoid() * state + key[:, step, :, None] * value[:, step, None]
            outputs.append((query[:, step, None] @ state).squeeze(1))
        return torch.stack(outputs, 1)


ATTENTION.add("linear_attention_loop", LinearAttention, only_x(4, 8), squares)
