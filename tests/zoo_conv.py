"""Cases: convolutions in one to three dims, their options, pooling and small image models."""

from __future__ import annotations

from driver import Zoo
from torch import nn
from zoo_inputs import classification, cross_entropy, only_x, squares

CONV = Zoo()

_LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SIZE = {1: 9, 2: 7, 3: 5}

_OPTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "strided_dilated_grouped": {"stride": 2, "dilation": 2, "padding": 2, "groups": 2},
    "same_padding": {"padding": "same"},
}


def conv_net(dims: int, options: dict, layers: dict = _LAYERS) -> nn.Module:
    """Two layers, so that the tested one also passes a gradient on."""
    return nn.Sequential(
        layers[dims](4, 6, 3, **options), nn.Tanh(), _LAYERS[dims](6, 2, 1, bias=False)
    )


for _dims in (1, 2, 3):
    _image = only_x(4, *(_SIZE[_dims],) * _dims)
    for _name, _options in _OPTIONS.items():
        if _dims == 3 and _name not in ("plain", "strided_dilated_grouped"):
            continue
        CONV.add(f"conv{_dims}d_{_name}",
                 lambda d=_dims, o=_options: conv_net(d, o), _image, squares)
    for _name, _options in {
        "plain": {},
        "strided": {"stride": 2, "padding": 1, "output_padding": 1},
        "grouped_dilated": {"groups": 2, "dilation": 2},
    }.items():
        if _dims == 3 and _name == "grouped_dilated":
            continue
        CONV.add(f"conv_transpose{_dims}d_{_name}",
                 lambda d=_dims, o=_options: conv_net(d, o, _TRANSPOSED), _image, squares)

for _mode in ("reflect", "replicate", "circular"):
    CONV.add(f"conv2d_{_mode}_padding",
             lambda mode=_mode: conv_net(2, {"padding": 1, "padding_mode": mode}),
             only_x(4, 6, 6), squares)

CONV.add("conv1d_depthwise",
         lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Tanh(), nn.Conv1d(4, 2, 1)),
         only_x(4, 9), squares)
CONV.add("conv2d_depthwise_multiplier",
         lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 2, 1)),
         only_x(4, 6, 6), squares)
CONV.add("conv2d_even_kernel_uneven_stride",
         lambda: conv_net(2, {"stride": (2, 1)}), only_x(4, 8, 7), squares)
CONV.add("conv2d_first_layer_only", lambda: nn.Conv2d(3, 5, 3), only_x(3, 6, 6), squares)
CONV.add("conv2d_channels_equal_batch",
         lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 1)),
         only_x(4, 4, 4), squares)
CONV.add("patch_embedding",
         lambda: nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(4, 3)),
         only_x(3, 8, 8), squares)


def small_cnn(pool: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), pool,
        nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )


CONV.add("cnn_max_pool", lambda: small_cnn(nn.MaxPool2d(2)),
         classification(3, 8, 8, classes=3), cross_entropy)
CONV.add("cnn_avg_pool", lambda: small_cnn(nn.AvgPool2d(2)),
         classification(3, 8, 8, classes=3), cross_entropy)
CONV.add("cnn_upsample",
         lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Tanh(),
                               nn.Conv2d(4, 2, 3)),
         only_x(3, 5, 5), squares)
CONV.add("cnn_bilinear_upsample",
         lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"),
                               nn.Tanh(), nn.Conv2d(4, 2, 3)),
         only_x(3, 5, 5), squares)
CONV.add("pixel_shuffle",
         lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.Tanh(),
                               nn.Conv2d(2, 2, 3)),
         only_x(3, 5, 5), squares)


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(3, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.second(self.norms[1](self.first(self.norms[0](x).relu()).relu()))
        return self.head(x.mean((2, 3)))


CONV.add("residual_block", ResidualBlock, classification(3, 6, 6, classes=3), cross_entropy)
