"""What arguments have to be: each check raises ValueError that says what came and what is wanted.
And what a bijection has to be.

Checks of values wait for a GPU, and torch.compile divides its graph at them.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, _disable_dynamo   # torch.compiler.disable imports Dynamo, for a second

MOST = 0.5      # the share of values 0 and 1 in images that can hardly be dequantised


def check_tensor(name: str, x: object) -> None:
    """x, called `name`, has to be a tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}, and must be a tensor")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """x, called `name`, has to be a tensor of shape (B, *shape)."""
    check_tensor(name, x)
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, and must have shape "
                         f"(B, {', '.join(map(str, shape))})")


@_disable_dynamo
def check_values(name: str, x: Tensor, good: Tensor, is_image: bool) -> None:
    """`good`, of the shape of x, has to be true everywhere.

    Images most of whose values are 0 or 1 give a warning: some are legitimate, such as a black one.
    """
    if not good.all():
        found = f"from {x.min():.8g} to {x.max():.8g}"
        if n := int(x.isnan().sum()):
            found = f"that are NaN, {n} of {x.numel()}"
        raise ValueError(f"{name} has values {found}, and must be "
                         f"{'in [0, 1]' if is_image else 'finite'}")
    if is_image and ((x == 0) | (x == 1)).double().mean() > MOST:
        warnings.warn("most values of x are 0 or 1: log p(x) means nothing for images that are not "
                      "dequantised, x = (grey level + u) / levels", stacklevel=1)


@_disable_dynamo
def check_labels(y: Tensor, n_classes: int) -> None:
    """y has to be (B,), integers from 0 to n_classes - 1."""
    check_tensor("y", y)
    if y.dim() != 1 or y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise ValueError(f"labels have shape {tuple(y.shape)} and type {y.dtype}, and must be "
                         "integers of shape (B,)")
    if ((y < 0) | (y >= n_classes)).any():
        raise ValueError(f"labels are from {int(y.min())} to {int(y.max())}, and must be from 0 to "
                         f"{n_classes - 1}")


def check_grey_levels(name: str, x: Tensor, grey_levels: int) -> None:
    """x, called `name`, has to be integers from 0 to grey_levels - 1."""
    check_integers(name, x)
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < grey_levels:
        raise ValueError(f"{name} have grey levels from {int(x.min())} to {int(x.max())}, and must "
                         f"have them from 0 to {grey_levels - 1}")


def check_integers(name: str, x: Tensor) -> None:
    """x, called `name`, has to be integers."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, not of type {x.dtype}")


def check_bijection(f: Any, x: Tensor, *context: Tensor) -> None:
    """f has to have an exact inverse, and ldj has to be that of its Jacobian, found by autograd.

    f: in double precision: forward(x, *context) -> (z, ldj), inverse(z, *context) -> x. Many
        bijections are the identity at the start: give their parameters random values first
    x, context: B examples, and what else f takes of each

    Each example has to give what it gives in the batch. Raises AssertionError, which gives the
    difference, and ValueError for other x or context.
    """
    if x.dtype != torch.float64 or not len(x) or any(len(c) != len(x) for c in context):
        raise ValueError(f"x is {tuple(x.shape)} of {x.dtype}, with context of "
                         f"{[len(c) for c in context]} rows: x must be one or more examples in "
                         "double precision, with a row of context for each")

    def agree(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance,
                                   msg=lambda message: f"{what}: {message}")
    z, ldj = f(x, *context)
    if not isinstance(ldj, Tensor) or ldj.shape != x.shape[:1]:
        raise AssertionError(f"ldj is not a tensor of shape ({len(x)},): {ldj}")
    agree(f.inverse(z, *context), x, 1e-10, "inverse(forward(x)) is not x")
    agree(f(f.inverse(z, *context), *context)[0], z, 1e-9, "forward(inverse(z)) is not z")
    for i in range(len(x)):
        row, *rest = (t[i:i + 1] for t in (x, *context))
        agree(f.inverse(z[i:i + 1], *rest), row, 1e-10, "inverse(z) of one example is not its x")
        agree(f(row, *rest)[0], z[i:i + 1], 1e-9, "forward(x) of one example is not its z")
        jacobian = torch.autograd.functional.jacobian(
            lambda v, rest=rest: f(v, *rest)[0], row)
        expected = torch.linalg.slogdet(jacobian.view(x[i].numel(), -1)).logabsdet
        torch.testing.assert_close(ldj[i], expected, rtol=1e-9, atol=1e-9, msg=lambda message:
                                   f"ldj is not that of the Jacobian: {message}")
