"""The semi-conditional flow: p(x, y) = p(y) p(x | y), where one pass of f_w serves all classes y.

    x --f_w--> z = (z_aux, z_f)         large, independent of y
    z_f --h_phi( . ; y)--> z_h          small, conditioned on y

where z_f is the last ssl_dim dimensions of z, and

    log p(x | y) = log|det df_w/dx| + log N(z_aux) + log|det dh_phi/dz_f| + log N(z_h)
    log p(x)     = logsumexp_y [ log p(x | y) + log p(y) ]
    p(y | x)     = softmax_y   [ log p(x | y) + log p(y) ]

(Atanov et al. 2019, arXiv 1905.00505.)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bijections import ActNorm, Bijection, MultiScale, Shape
from .checks import check_labels, check_shape, check_values
from .h_phi import ConditionalFlow, ConditionalShift


class DiagonalGaussian(nn.Module):
    """N(0, diag(sigma^2)) with sigma = softplus(logsigma), logsigma trained, 0 at the start.

    The paper has sigma = 1. The authors' code trains it, starting at softplus(0) = 0.693, as we do.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.logsigma = nn.Parameter(torch.zeros(dim))

    @property
    def sigma(self) -> Tensor:
        """The standard deviations, (dim,)."""
        return F.softplus(self.logsigma)

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, diag(sigma^2)), in nats: (B, dim) -> (B,)."""
        log_p = -0.5 * (z / self.sigma) ** 2 - self.sigma.log() - 0.5 * math.log(2 * math.pi)
        return log_p.sum(-1)

    def sample(self, eps: Tensor) -> Tensor:
        """Transform standard normal noise eps (B, dim) into a sample: (B, dim)."""
        return self.sigma * eps


class SemiConditionalFlow(nn.Module):
    """log p(x, y), log p(x), p(y | x), and samples.

    f_w: the large flow, x (B, C, H, W) -> z (B, D)
    h_phi: the conditional flow on z_f
    data_shape: (C, H, W), of D dimensions in all
    ssl_dim: the dimensions of z_f, which is last in z
    n_classes: K
    class_probs: p(y), K positive numbers, or None for uniform

    Raises ValueError if class_probs is not K positive numbers. Every method raises it for arguments
    whose shape or type does not match its docstring, and for values of x, eps, or z in `decode`,
    that are not finite or, of images, not in [0, 1]; the logit takes 0.026 more on both sides.
    """

    cheap_logits = False    # whether `logits` computes less than `log_joint`
    log_p_y: Tensor

    def __init__(self, f_w: MultiScale, h_phi: ConditionalFlow | ConditionalShift,
                 data_shape: Sequence[int], ssl_dim: int, n_classes: int,
                 class_probs: Sequence[float] | None = None):
        super().__init__()
        self.data_shape, self.n_classes, self.ssl_dim = tuple(data_shape), n_classes, ssl_dim
        self.dim = torch.Size(data_shape).numel()
        self.image = data_shape[1] > 1      # with values in [0, 1]
        self.f_w, self.h_phi = f_w, h_phi
        self.base_aux = DiagonalGaussian(self.dim - ssl_dim)  # of z_aux
        self.base_h = DiagonalGaussian(ssl_dim)  # of z_h
        uniform = torch.full((n_classes,), 1 / n_classes)
        p_y = torch.as_tensor(uniform if class_probs is None else class_probs, dtype=torch.float64)
        if p_y.shape != (n_classes,) or not (p_y > 0).all() or not p_y.sum().isfinite():
            raise ValueError(f"class_probs must be {n_classes} positive numbers")
        log_p_y = (p_y / p_y.sum()).log().to(torch.get_default_dtype())
        self.register_buffer("log_p_y", log_p_y)  # (K,)

    @property
    def checks_values(self) -> bool:
        """Whether methods check values, which waits for a GPU and breaks torch.compile's graph."""
        return self.h_phi.checks_values

    @checks_values.setter
    def checks_values(self, value: bool) -> None:
        self.h_phi.checks_values = value

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f_w: x (B, C, H, W) -> z (B, D) = (z_aux, z_f), ldj (B,)."""
        self._check("x", x, self.data_shape)
        return self.f_w(x)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of f_w: z (B, D) -> x (B, C, H, W).

        Rounding errors in z are multiplied by up to the largest singular value of dx/dz. This is
        large where x is improbable, above all in model pyramid: for the first layer of mnist-best
        it is 70 at the first test image and 4e7 at the worst of 1,000. There
        |decode(encode(x)) - x| is 0.3, for the others at most 0.003, and on images of uniform noise
        0.9. model.double() reduces the error, on these test images to 1e-7. pretrained/README.md
        has the largest errors of all shipped weights. Where float32 overflows, x is NaN.
        """
        self._check("z", z, (self.dim,))
        return self.f_w.inverse(z)

    def split_latent(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, D) -> z_aux (B, D - ssl_dim), z_f (B, ssl_dim)."""
        self._check("z", z, (self.dim,), values=False)
        z_aux, z_f = z.split([self.dim - self.ssl_dim, self.ssl_dim], 1)
        return z_aux, z_f

    def log_zf_joint(self, z_f: Tensor) -> Tensor:
        """log p(z_f, y) for each of the K classes, in nats: z_f (B, ssl_dim) -> (B, K)."""
        self._check("z_f", z_f, (self.ssl_dim,), values=False)
        return self.h_phi.log_prob(z_f, self.base_h) + self.log_p_y

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y) for each of the K classes, in nats: x (B, C, H, W) -> (B, K)."""
        z, ldj = self.encode(x)
        z_aux, z_f = self.split_latent(z)
        return (ldj + self.base_aux.log_prob(z_aux))[:, None] + self.log_zf_joint(z_f)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), in nats: x (B, C, H, W) -> (B,)."""
        return self.log_joint(x).logsumexp(1)

    def posterior(self, x: Tensor) -> Tensor:
        """p(y | x): x (B, C, H, W) -> (B, K)."""
        return self.logits(x).softmax(1)

    def logits(self, x: Tensor) -> Tensor:
        """log p(z_f, y), in which p(y | x) is a softmax: x (B, C, H, W) -> (B, K).

        The other terms of log p(x, y) come from f_w, do not depend on y, and cancel.
        """
        z, _ = self.encode(x)
        _, z_f = self.split_latent(z)
        return self.log_zf_joint(z_f)

    @torch.no_grad()
    def sample(self, y: Tensor, eps: Tensor | None = None) -> Tensor:
        """Sample from p(x | y): x (B, C, H, W), images clamped to [0, 1].

        y: labels (B,), integers from 0 to K - 1
        eps: standard normal noise (B, D), sampled if None; the same noise with another label gives
            the corresponding sample of that class

        Where float32 overflows, values of the sample are NaN: of mnist-glow it happens with noise
        of standard deviation 1.3 and more.
        """
        check_labels(y, self.n_classes)
        if eps is None:
            dtype, device = self.log_p_y.dtype, self.log_p_y.device
            eps = torch.randn(len(y), self.dim, dtype=dtype, device=device)
        self._check("eps", eps, (self.dim,))
        eps_aux, eps_h = self.split_latent(eps)
        z_f = self.h_phi.inverse(self.base_h.sample(eps_h), y)
        x = self.f_w.inverse(torch.cat((self.base_aux.sample(eps_aux), z_f), 1))
        return x.where(x.isfinite(), torch.nan).clamp(0, 1) if self.image else x

    @torch.no_grad()
    def initialize(self, x: Tensor, images: Tensor | None = None) -> None:
        """Set what depends on the data, once, before training.

        x: a batch (B, C, H, W), for the ActNorms that are not initialised yet; each is set from its
            input, in the order of the forward pass; the ActNorms of h_phi see every sample with
            every label
        images: the training images (N, C, H, W), as integer grey levels, for a first layer that is
            fitted to them and has not been

        Raises ValueError if such a layer gets no images, or if the examples in x are all equal.
        """
        self._check("x", x, self.data_shape)
        if not len(x) or (x == x[:1]).all():
            raise ValueError("the model is initialised from two different examples at least, not "
                             f"from {len(x)}{' equal ones' * (len(x) > 1)}")
        for part in self.modules():
            if isinstance(part, Bijection) and not part.fitted:
                part.fit(images)
        hooks = [part.register_forward_pre_hook(lambda act, args: act.initialize(args[0]))
                 for part in self.modules() if isinstance(part, ActNorm) and not part.initialized]
        try:
            _, z_f = self.split_latent(self.encode(x)[0])
            every = torch.arange(self.n_classes, device=x.device)
            self.h_phi.log_prob_of(every, z_f, self.base_h)
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, name: str, x: Tensor, shape: Shape, values: bool = True) -> None:
        """Raise ValueError unless x is (B, *shape), of the type of the model and, with `values`,
        has values that x, z or eps can have."""
        is_x, is_image = name == "x", name == "x" and self.image
        check_shape(name, x, shape)
        if x.dtype != self.log_p_y.dtype:
            raise ValueError(f"{name} is of type {x.dtype}, and must be of {self.log_p_y.dtype}"
                             f"{', with values in [0, 1]' * is_image}")
        if values and self.checks_values:
            first: Any = self.f_w.levels[0][0]
            check_values(name, x, first.in_domain(x) if is_x else x.isfinite(), is_image)
