"""The semi-conditional flow: p(x, y) = p(y) p(x | y) with one pass of the large part for all y.

    x --f_w--> z = (z_aux, z_f)         large, never sees y;  z_f: the last ssl_dim dimensions
    z_f --h_phi( . ; y)--> z_h          small, the only room that y enters

    log p(x | y) = log|det df_w/dx| + log N(z_aux) + log|det dh_phi/dz_f| + log N(z_h)

(Atanov et al. 2019, arXiv 1905.00505.)
"""

import torch
from torch import nn

from utils import BadInput

from .bases import DiagonalGaussian
from .bijections import ActNorm


class SemiConditionalFlow(nn.Module):
    """log p(x, y), log p(x), p(y | x), samples.

    f_w: MultiScale over data of `data_shape`; h_phi: ConditionalFlow or ConditionalShift on the
    last `ssl_dim` of its D dimensions; class_probs: p(y), K numbers (None: uniform).
    `image`: the data lives in [0, 1], and samples are clamped to it.
    """

    def __init__(self, f_w, h_phi, data_shape, ssl_dim, n_classes, class_probs=None):
        super().__init__()
        self.data_shape, self.n_classes, self.ssl_dim = tuple(data_shape), n_classes, ssl_dim
        self.dim = torch.Size(data_shape).numel()
        self.image = data_shape[1] > 1
        self.f_w, self.h_phi = f_w, h_phi
        self.base_aux = DiagonalGaussian(self.dim - ssl_dim)              # of z_aux
        self.base_h = DiagonalGaussian(ssl_dim)                           # of z_h
        if class_probs is None:
            class_probs = torch.full((n_classes,), 1 / n_classes)
        class_probs = torch.as_tensor(class_probs, dtype=torch.float64)
        if class_probs.shape != (n_classes,) or not bool((class_probs > 0).all()):
            raise BadInput(f"class_probs must be {n_classes} positive numbers")
        log_p_y = (class_probs / class_probs.sum()).log().to(torch.get_default_dtype())
        self.register_buffer("log_p_y", log_p_y)                          # (K,)

    def encode(self, x):
        """f_w: x (B, C, H, W) -> z (B, D) = (z_aux, z_f), ldj (B,)."""
        return self.f_w(x)

    def decode(self, z):
        """The inverse of `encode`: z (B, D) -> x (B, C, H, W)."""
        return self.f_w.inverse(z)

    def split_latent(self, z):
        """z (B, D) -> z_aux (B, D - ssl_dim), z_f (B, ssl_dim)."""
        return z.split([self.dim - self.ssl_dim, self.ssl_dim], 1)

    def log_zf_joint(self, z_f):
        """log p(z_f, y) for all K classes at once: z_f (B, ssl_dim) -> (B, K)."""
        k = self.n_classes
        y = torch.arange(k, device=z_f.device).repeat(len(z_f))           # (B * K,)
        z_h, ldj = self.h_phi(z_f.repeat_interleave(k, 0), y)
        return (ldj + self.base_h.log_prob(z_h)).view(-1, k) + self.log_p_y

    def log_joint(self, x):
        """log p(x, y) for all K classes, in nats: x (B, C, H, W) -> (B, K)."""
        z, ldj = self.encode(x)
        z_aux, z_f = self.split_latent(z)
        return (ldj + self.base_aux.log_prob(z_aux))[:, None] + self.log_zf_joint(z_f)

    def log_prob(self, x):
        """log p(x), in nats: (B,)."""
        return self.log_joint(x).logsumexp(1)

    def posterior(self, x):
        """p(y | x): (B, K). f_w's terms are the same for every y and cancel."""
        _, z_f = self.split_latent(self.encode(x)[0])
        return self.log_zf_joint(z_f).softmax(1)

    @torch.no_grad()
    def sample(self, y, eps=None):
        """Draw x from p(x | y): labels y (B,) -> (B, C, H, W), images in [0, 1].

        eps: the standard normal noise (B, D) to start from, drawn if None; the same noise with
        another label gives the same draw of that class.
        """
        if eps is None:
            eps = torch.randn(len(y), self.dim, dtype=self.log_p_y.dtype, device=self.log_p_y.device)
        eps_aux, eps_h = self.split_latent(eps)
        z_f = self.h_phi.inverse(self.base_h.sample(eps_h), y)
        x = self.decode(torch.cat((self.base_aux.sample(eps_aux), z_f), 1))
        return x.clamp(0, 1) if self.image else x

    @torch.no_grad()
    def initialize(self, x):
        """Initialise each ActNorm that is not yet, in order, from what batch x makes of its input.

        To be called once before training. h_phi's see the batch with every label.
        """
        acts = [m for m in self.modules() if isinstance(m, ActNorm) and not m.initialized]
        hooks = [act.register_forward_pre_hook(lambda act, args: act.initialize(args[0])) for act in acts]
        try:
            self.log_joint(x)
        finally:
            for hook in hooks:
                hook.remove()
