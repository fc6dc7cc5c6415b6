"""The custom ops ``flashnorm::ghost_norms`` and ``flashnorm::ghost_product``.

From the columns l_t of ``left_b`` [m, T] and the rows r_t of ``right_b`` [T, n], whose product
Σ_t l_t r_tᵀ is one sample's gradient, they find sums over all pairs of tokens, without the product
and, on a GPU, without writing the Gram matrices (l_t·l_s) and (r_t·r_s): only the first, and only
where left is as wide as a large vocabulary.

Precision: products of 16-bit numbers are exact and are added up in float32 by the tensor cores, the
sum over pairs in float32 too. Its error stays below 2⁻¹⁸ of the sum of absolute values: after the
tensor cores no number goes through more than 63 additions. Results repeat bit by bit: nothing is
added atomically.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashnorm_compile.kernels.ghost_norm import reference

# On a GPU. Gram products of wider numbers would need float64 (see ``passes/sites/rounding.py``).
HALF = (torch.bfloat16, torch.float16)


@torch.library.custom_op("flashnorm::ghost_norms", mutates_args=())
def ghost_norms(
    lefts: list[Tensor], rights: list[Tensor], left_errors: list[float], right_errors: list[float]
) -> Tensor:
    """Return sums over the Gram matrices of each sample's tokens, for every layer k.

    With ‖l_t‖ and ‖r_t‖ taken from the Gram matrices' diagonals as
    ``sqrt((1 + 2·error)·(l_t·l_t) + 2⁻¹⁰⁰)``, which is not below the norm itself:

        0  square:   Σ_{t,s} (l_t·l_s)(r_t·r_s), which is ‖left_b·right_b‖²
        1  spread:   Σ_t ‖l_t‖‖r_t‖
        2  by left:  Σ_{t,s} |r_t·r_s|‖l_t‖‖l_s‖, the weight of errors of l_t·l_s
        3  by right: Σ_{t,s} |l_t·l_s|‖r_t‖‖r_s‖, the weight of errors of r_t·r_s

    Layers of one call share launches, if their T and their layouts are the same: together they fill
    a GPU to the last where one does not, and spare the host.

    Args:
        lefts: at least one [B, m, T], B the same for all, any strides; bfloat16 or float16, on a
            CPU any floating dtype.
        rights: [B, T, n] each, of the dtype of its left; any strides. Read fast where each operand
            has a dim of stride 1, and addresses and other strides are multiples of 16 bytes; copied
            if not.
        left_errors: of each layer, the largest error of l_t·l_s as computed, relative to
            ‖l_t‖‖l_s‖.
        right_errors: the same of r_t·r_s.

    Returns:
        A new float32 tensor [4, layers, B]. A sample whose operands are not finite gets infinity or
        NaN, and changes no other's.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or they do not fit each other.
    """
    _validate_layers(lefts, rights, left_errors, right_errors)
    layers = zip(lefts, rights, left_errors, right_errors, strict=True)
    return torch.stack([reference.ghost_norm(*layer).float() for layer in layers], 1)


def ghost_norm(left: Tensor, right: Tensor, left_error: float, right_error: float) -> Tensor:
    """Return the sums [4, B] of `ghost_norms` for one layer."""
    return ghost_norms([left], [right], [left_error], [right_error])[:, 0]


@torch.library.custom_op("flashnorm::ghost_product", mutates_args=())
def ghost_product(
    left: Tensor,
    right: Tensor,
    left2: Tensor,
    right2: Tensor,
    left_norms: Tensor,
    right_norms: Tensor,
    left2_norms: Tensor,
    right2_norms: Tensor,
) -> Tensor:
    """Return sums over the products of tokens of two sites of one parameter.

        0  product:  Σ_{t,s} (l_t·l'_s)(r_t·r'_s), which is ⟨left_b·right_b, left2_b·right2_b⟩
        1  by left:  Σ_{t,s} |r_t·r'_s|‖l_t‖‖l'_s‖
        2  by right: Σ_{t,s} |l_t·l'_s|‖r_t‖‖r'_s‖

    Norms are arguments: a site's norms serve all products that it is in.

    Args:
        left: [B, m, T], as in `ghost_norm`.
        right: [B, T, n].
        left2: [B, m, S].
        right2: [B, S, n].
        left_norms: ‖l_t‖, float32 [B, T].
        right_norms: ‖r_t‖, float32 [B, T].
        left2_norms: ‖l'_s‖, float32 [B, S].
        right2_norms: ‖r'_s‖, float32 [B, S].

    Returns:
        A new float32 tensor [3, B], as in `ghost_norm`.

    Raises:
        ValueError: an argument has the wrong dtype or shape, or they do not fit each other.
    """
    norms = (left_norms, right_norms, left2_norms, right2_norms)
    _validate("ghost_product", left, right, left2, right2, norms)
    return reference.ghost_product(left, right, left2, right2, *norms).float()


@ghost_norms.register_fake
def _(
    lefts: list[Tensor], rights: list[Tensor], left_errors: list[float], right_errors: list[float]
) -> Tensor:
    _validate_layers(lefts, rights, left_errors, right_errors)
    return lefts[0].new_empty((4, len(lefts), lefts[0].shape[0]), dtype=torch.float32)


@ghost_product.register_fake
def _(
    left: Tensor,
    right: Tensor,
    left2: Tensor,
    right2: Tensor,
    left_norms: Tensor,
    right_norms: Tensor,
    left2_norms: Tensor,
    right2_norms: Tensor,
) -> Tensor:
    norms = (left_norms, right_norms, left2_norms, right2_norms)
    _validate("ghost_product", left, right, left2, right2, norms)
    return left.new_empty((3, left.shape[0]), dtype=torch.float32)


@ghost_norms.register_kernel("cuda")
def _(
    lefts: list[Tensor], rights: list[Tensor], left_errors: list[float], right_errors: list[float]
) -> Tensor:
    # Imported here: the package must import where Triton is not installed.
    from flashnorm_compile.kernels.ghost_norm import launch

    _validate_layers(lefts, rights, left_errors, right_errors)
    return launch.ghost_norms(lefts, rights, left_errors, right_errors)


@ghost_product.register_kernel("cuda")
def _(
    left: Tensor,
    right: Tensor,
    left2: Tensor,
    right2: Tensor,
    left_norms: Tensor,
    right_norms: Tensor,
    left2_norms: Tensor,
    right2_norms: Tensor,
) -> Tensor:
    from flashnorm_compile.kernels.ghost_norm import launch

    norms = (left_norms, right_norms, left2_norms, right2_norms)
    _validate("ghost_product", left, right, left2, right2, norms)
    return launch.ghost_product(left, right, left2, right2, *norms)


def _validate_layers(
    lefts: list[Tensor], rights: list[Tensor], left_errors: list[float], right_errors: list[float]
) -> None:
    counts = [len(x) for x in (lefts, rights, left_errors, right_errors)]
    if not lefts or len(set(counts)) != 1:
        raise ValueError(
            "ghost_norms: lefts, rights, left_errors and right_errors have "
            f"{', '.join(map(str, counts))} entries; expected the same number of each, 1 or more"
        )
    for k, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        _validate("ghost_norms", left, right, left, right)
        sizes = lefts[0].shape[0], left.shape[0]
        # Only sizes that are known: a comparison of symbolic ones would fix them.
        known = all(isinstance(size, int) for size in sizes)
        if left.device != lefts[0].device or (known and sizes[0] != sizes[1]):
            raise ValueError(
                f"ghost_norms: lefts[{k}] holds {sizes[1]} samples on {left.device} and lefts[0] "
                f"{sizes[0]} on {lefts[0].device}; expected the same for all"
            )


def _validate(
    op: str,
    left: Tensor,
    right: Tensor,
    left2: Tensor,
    right2: Tensor,
    norms: tuple[Tensor, ...] = (),
) -> None:
    operands = {"left": left, "right": right, "left2": left2, "right2": right2}
    for name, x in operands.items():
        if x.dim() != 3 or x.dtype != left.dtype or x.device != left.device:
            raise ValueError(
                f"{op}: {name} is {x.dtype}, {x.dim()}-d, on {x.device}; "
                f"expected 3-d, and one dtype and device for all (left is {left.dtype} on "
                f"{left.device})"
            )
    if not left.dtype.is_floating_point or (left.is_cuda and left.dtype not in HALF):
        where = "bfloat16 or float16 on a GPU" if left.is_cuda else "a floating dtype"
        raise ValueError(f"{op}: operands are {left.dtype}; expected {where}")
    known = dict[str, tuple[int, str]]()
    for (name, x), letters in zip(operands.items(), ("BmT", "BTn", "BmS", "BSn"), strict=True):
        _match(op, name, x, letters, known)
    names = ("left_norms", "right_norms", "left2_norms", "right2_norms")
    for name, x, letters in zip(names, norms, ("BT", "BT", "BS", "BS"), strict=False):
        if x.dim() != 2 or x.dtype != torch.float32 or x.device != left.device:
            raise ValueError(
                f"{op}: {name} is {x.dtype}, {x.dim()}-d, on {x.device}; "
                f"expected float32 [{', '.join(letters)}] on {left.device}"
            )
        _match(op, name, x, letters, known)


def _match(
    op: str, name: str, x: Tensor, letters: str, known: dict[str, tuple[int, str]]
) -> None:
    """Raise unless sizes of the same letter are equal."""
    for letter, size in zip(letters, x.shape, strict=True):
        # Only sizes that are known: a comparison of symbolic ones would fix them.
        if not isinstance(size, int):
            continue
        expected, source = known.setdefault(letter, (size, name))
        if size != expected:
            raise ValueError(
                f"{op}: {name} [{', '.join(letters)}] is {list(x.shape)}; "
                f"{source} has {letter} = {expected}"
            )
