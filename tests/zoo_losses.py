"""Cases: the loss: reductions, normalisers that depend on data, sums of several losses."""

from __future__ import annotations

import torch
from driver import Zoo
from torch import nn
from torch.nn import functional as F
from zoo_dense import mlp
from zoo_inputs import classification, regression
from zoo_sharing import VOCAB, TiedHead

LOSSES = Zoo()
IGNORED = -100


def uneven_tokens(size: int, *, length: int = 7, empty: bool = False):
    """Return ids and labels [B, T]; every sample ignores another number of labels."""
    ids = torch.randint(VOCAB, (size, length))
    labels = torch.randint(VOCAB, (size, length))
    for row in range(size):
        kept = 0 if empty and row == 1 else 1 + (2 * row) % length
        labels[row, kept:] = IGNORED
    return ids, labels


def _add(name, loss, *, reduction="mean", inputs=None, model=mlp, **options):
    LOSSES.add(name, model, inputs or classification(6, classes=3), loss,
               loss_reduction=reduction, **options)


_add("sum", lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum"), reduction="sum")
_add("mean_of_unreduced", lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").mean())
_add("sum_over_size",
     lambda m, x, y: F.cross_entropy(m(x), y, reduction="none").sum() / x.shape[0])
_add("sum_over_len", lambda m, x, y: F.cross_entropy(m(x), y, reduction="sum") / len(y))
_add("scaled", lambda m, x, y: 3.0 * F.cross_entropy(m(x), y) / 7.0)
_add("label_smoothing", lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1))
if torch.__version__ >= (2, 13):
    # Earlier, its backward was made for one size of batch alone (and is refused).
    _add("soft_labels", lambda m, x, y: F.cross_entropy(m(x), y.softmax(-1)),
         inputs=regression(6, targets=(3,)))
_add("log_softmax_nll", lambda m, x, y: F.nll_loss(F.log_softmax(m(x), -1), y))
_add("logsumexp_minus_gather",
     lambda m, x, y: (m(x).logsumexp(-1) - m(x).gather(1, y[:, None])[:, 0]).mean())
_add("mse_sum", lambda m, x, y: F.mse_loss(m(x), y, reduction="sum"), reduction="sum",
     inputs=regression(6, targets=(3,)))
_add("l1", lambda m, x, y: F.l1_loss(m(x), y), inputs=regression(6, targets=(3,)))
_add("smooth_l1", lambda m, x, y: F.smooth_l1_loss(m(x), y), inputs=regression(6, targets=(3,)))
_add("huber_time_axis", lambda m, x, y: F.huber_loss(m(x), y),
     inputs=regression(5, 6, targets=(5, 3)))
_add("bce_with_logits",
     lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), y.sigmoid()),
     inputs=regression(6, targets=(3,)))
_add("bce", lambda m, x, y: F.binary_cross_entropy(m(x).sigmoid(), y.sigmoid()),
     inputs=regression(6, targets=(3,)))
_add("kl_div_batchmean",
     lambda m, x, y: F.kl_div(F.log_softmax(m(x), -1), y.softmax(-1), reduction="batchmean"),
     inputs=regression(6, targets=(3,)))
_add("kl_div_mean",
     lambda m, x, y: F.kl_div(F.log_softmax(m(x), -1), y.softmax(-1), reduction="mean"),
     inputs=regression(6, targets=(3,)))
_add("hinge", lambda m, x, y: F.multi_margin_loss(m(x), y))
_add("cosine", lambda m, x, y: (1 - F.cosine_similarity(m(x), y)).mean(),
     inputs=regression(6, targets=(3,)))
_add("gaussian_nll",
     lambda m, x, y: 0.5 * ((m(x) - y).square() / (y.square() + 0.5)).mean(),
     inputs=regression(6, targets=(3,)))
_add("l2_regulariser",
     lambda m, x, y: F.cross_entropy(m(x), y)
     + 0.1 * sum(p.square().sum() for p in m.parameters()))
_add("regulariser_on_one_weight",
     lambda m, x, y: F.cross_entropy(m(x), y) + 0.05 * m[0].weight.abs().sum())
_add("activation_penalty",
     lambda m, x, y: F.cross_entropy(m(x), y) + 0.1 * m[0](x).square().mean())
_add("two_heads_two_means",
     lambda m, x, y: F.mse_loss(m(x), y) + 0.5 * m(x).mean(1).abs().mean(),
     inputs=regression(5, 6, targets=(5, 3)))


class ClassWeights(nn.Module):
    """The weighted mean divides by the weights of the batch's labels: a normaliser from data."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("weights", torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, x, y, *, reduction):
        return F.cross_entropy(self.net(x), y, weight=self.weights, reduction=reduction)


_add("class_weights_mean", lambda m, x, y: m(x, y, reduction="mean"), model=ClassWeights)
_add("class_weights_sum", lambda m, x, y: m(x, y, reduction="sum"), model=ClassWeights,
     reduction="sum")


def token_mean(model, ids, labels):
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def token_mean_transposed(model, ids, labels):
    return F.cross_entropy(model(ids).transpose(1, 2), labels, ignore_index=IGNORED)


def shifted_token_mean(model, ids, labels):
    """The loss of a decoder: predict the next token."""
    logits, labels = model(ids)[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def masked_token_mean(model, ids, labels):
    """The same as token_mean, spelt with a mask and its sum."""
    losses = F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    mask = (labels != IGNORED).float()
    return (losses * mask).sum() / mask.sum()


def per_sample_masked_mean(model, ids, labels):
    """Each sample's own mean over its tokens, then the batch's mean."""
    losses = F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    mask = (labels != IGNORED).float()
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def clamped_token_mean(model, ids, labels):
    losses = F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    mask = (labels != IGNORED).float()
    return (losses * mask).sum() / mask.sum().clamp(min=1.0)


def mean_over_mean_of_mask(model, ids, labels):
    """Both means divide by B·T, which cancels."""
    losses = F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    mask = (labels != IGNORED).float()
    return (losses * mask).mean() / mask.mean()


def token_sum(model, ids, labels):
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED,
                           reduction="sum")


for _loss in (token_mean, token_mean_transposed, masked_token_mean, per_sample_masked_mean,
              clamped_token_mean, mean_over_mean_of_mask):
    _add(_loss.__name__, _loss, model=TiedHead, inputs=uneven_tokens)
_add("shifted_token_mean", shifted_token_mean, model=TiedHead,
     inputs=lambda size: uneven_tokens(size, length=9)[:1] * 2)
_add("token_sum", token_sum, reduction="sum", model=TiedHead, inputs=uneven_tokens)
_add("token_mean_one_sample_without_labels", token_mean, model=TiedHead,
     inputs=lambda size: uneven_tokens(size, empty=True))
_add("clamped_mean_one_sample_without_labels", clamped_token_mean, model=TiedHead,
     inputs=lambda size: uneven_tokens(size, empty=True))


class TwoTasks(nn.Module):
    """Masked tokens (mean over the batch's tokens) and a sentence label (mean over samples)."""

    def __init__(self):
        super().__init__()
        self.encoder, self.pooler = TiedHead(), nn.Linear(VOCAB, 2)

    def forward(self, ids):
        logits = self.encoder(ids)
        return logits, self.pooler(logits.tanh().mean(1))


def pretraining(model, ids, labels, sentence):
    logits, score = model(ids)
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    return tokens + F.cross_entropy(score, sentence)


def two_token_means(model, ids, labels, sentence):
    """Two normalisers from data, over different masks."""
    logits, score = model(ids)
    first = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    second = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=3)
    return first + 0.3 * second + F.cross_entropy(score, sentence)


for _loss in (pretraining, two_token_means):
    _add(_loss.__name__, _loss, model=TwoTasks,
         inputs=lambda size: (*uneven_tokens(size), torch.randint(2, (size,))))


class Clamp(torch.autograd.Function):
    """A hand-written function with a straight-through gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class ScaledSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


_add("custom_function_straight_through", lambda m, x, y: F.cross_entropy(Clamp.apply(m(x)), y))
_add("custom_function_saved_tensor", lambda m, x, y: F.cross_entropy(ScaledSquare.apply(m(x)), y))


def sample_weighted(model, x, y, weight):
    """Weights that come with the samples; the normaliser is the batch size."""
    return (F.cross_entropy(model(x), y, reduction="none") * weight).mean()


_add("sample_weights", sample_weighted,
     inputs=lambda size: (*classification(6, classes=3)(size), torch.rand(size)))


def distillation(model, x, teacher):
    """Temperature-scaled KL plus feature matching, with targets from outside."""
    logits = model(x)
    soft = F.kl_div(F.log_softmax(logits / 2, -1), (teacher / 2).softmax(-1),
                    reduction="batchmean")
    return 4 * soft + 0.1 * (logits - teacher).square().mean()


_add("distillation", distillation, inputs=regression(6, targets=(3,)))


def variational(model, x, noise):
    """Reparametrised Gaussian with the noise as an input, plus its KL per sample."""
    mean, log_variance, _ = model(x).chunk(3, -1)
    sample = mean + noise * (0.5 * log_variance).exp()
    kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)
    return (sample - x[:, :1]).square().sum(-1).mean() + 0.1 * kl.mean()


_add("variational", variational, inputs=regression(6, targets=(1,)))
