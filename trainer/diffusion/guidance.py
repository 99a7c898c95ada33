"""How two predictions become one (section 3 of the paper), and the relatives of that idea.

    eps~ = (1 + w) eps(z, c) - w eps(z)  =  eps(z, c) + w (eps(z, c) - eps(z))                         (equation 6)

Three choices make a guidance, and `guided` composes them into a denoiser:

    pair     where the strong and the weak prediction come from: one network with and without its condition (`joint`), two
             networks (`two_networks`), or the posterior-weighted mean over all classes (`posterior_weighted`)
    weight   w: a number, one number per sample, or a function of lambda (`interval`, `increasing`)
    rule     how they combine: `linear`, `projected` (APG), `rescaled`

Everywhere w is the paper's: w = 0 is unguided and costs one forward pass. Scales elsewhere called guidance_scale or cfg_scale,
and those of the interval and autoguidance papers, are 1 + w.

`space` names the quantity that the rule combines: eps, x, v or edm. A linear rule gives the same sample in all of them, since its
weights sum to one and the maps between them are affine. The other rules do not, so their space is part of the experiment.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from freeguide.trainer.diffusion.parametrisation import Network, Prediction, check_labels, output_of, predict
from freeguide.trainer.diffusion.schedule import Schedule, alpha_sigma, broadcast

Denoiser = Callable[[Tensor, Tensor, Tensor, Prediction | None], Prediction]
"""denoise(z (B, ...), logsnr () float64 on the CPU, labels (B,), the trajectory's previous prediction or None) -> Prediction."""

Pair = Callable[[Tensor, Tensor, Tensor, bool], tuple[Prediction, Prediction | None]]
"""pair(z, logsnr, labels, both) -> (strong, weak); weak is None, and not computed, where `both` is False."""

Weight = float | Tensor | Callable[[float], float | Tensor]
"""w: a number, one number per sample (B,), or a function of lambda that returns either."""

Rule = Callable[[Tensor, Tensor, float | Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""rule(strong, weak, w, momentum) -> (guided, momentum for the next level); w is a number or broadcasts against strong."""


# --- weights ---------------------------------------------------------------------------------------------------------------


def weight_at(w: Weight, logsnr: float) -> float | Tensor:
    """The guidance weight at one log-SNR: a number, or one per sample (B,)."""
    return w(logsnr) if callable(w) else w


def is_zero(weight: float | Tensor) -> bool:
    """Whether a weight is the number 0, at which the weak prediction is not computed."""
    return not isinstance(weight, Tensor) and weight == 0


def interval(w: Weight, low: float, high: float) -> Weight:
    """w inside low <= lambda < high and 0 elsewhere, where the weak prediction is then not computed.

    Kynkäänniemi et al. 2024 (arXiv 2404.07724) give bounds in EDM's sigma: lambda = -2 ln sigma, so (0.28, 2.90] is [-2.13, 2.55).

    Raises:
        ValueError: low is not below high.
    """
    if not low < high:
        raise ValueError(f"the guidance interval is [{low}, {high}), but its lower log-SNR must be below its upper one.")
    return lambda logsnr: weight_at(w, logsnr) if low <= logsnr < high else 0.0


def increasing(w: float, schedule: Schedule, shape: str = "linear") -> Weight:
    """A weight that grows from 0 at logsnr_min, with mean w over u: 2 w (1 - u), or w (1 + cos(pi u)) (arXiv 2404.13040).

    Raises:
        ValueError: a shape other than "linear" and "cosine".
    """
    if shape not in ("linear", "cosine"):
        raise ValueError(f"the shape of the guidance weight is {shape!r}, but it must be linear or cosine.")

    def weight(logsnr: float) -> float:
        u = schedule.u(torch.tensor(logsnr, dtype=torch.float64)).item()
        return 2 * w * (1 - u) if shape == "linear" else w * (1 + math.cos(math.pi * u))

    return weight


def first_guided(w: Weight, levels: Tensor) -> int:
    """The first step whose weight is not the number 0. Until there a sample does not depend on w, so a sweep can share it."""
    return next((t for t, logsnr in enumerate(levels.tolist()) if not is_zero(weight_at(w, logsnr))), len(levels))


# --- pairs -----------------------------------------------------------------------------------------------------------------


def joint(network: Network, null_label: int, *, kind: str = "eps", sigma_data: float = 0.5) -> Pair:
    """One network with and without its condition: a single forward pass of 2B rows, conditional rows first."""

    def pair(z: Tensor, logsnr: Tensor, labels: Tensor, both: bool) -> tuple[Prediction, Prediction | None]:
        if not both:
            return _ask(network, z, logsnr, labels, kind, sigma_data), None
        two = _ask(network, torch.cat((z, z)), logsnr, torch.cat((labels, torch.full_like(labels, null_label))), kind, sigma_data)
        x, eps = two.x.chunk(2), two.eps.chunk(2)
        return Prediction(x[0], eps[0]), Prediction(x[1], eps[1])

    return pair


def two_networks(
    network: Network, weak: Network, weak_label: int | None = None, *, kind: str = "eps", sigma_data: float = 0.5
) -> Pair:
    """Two networks. `weak_label` None: both see the condition (autoguidance). Else the weak one always sees `weak_label`."""

    def pair(z: Tensor, logsnr: Tensor, labels: Tensor, both: bool) -> tuple[Prediction, Prediction | None]:
        strong = _ask(network, z, logsnr, labels, kind, sigma_data)
        if not both:
            return strong, None
        condition = labels if weak_label is None else torch.full_like(labels, weak_label)
        return strong, _ask(weak, z, logsnr, condition, kind, sigma_data)

    return pair


def posterior_weighted(
    network: Network, log_posterior: Callable[[Tensor, Tensor], Tensor], classes: int, *, kind: str = "eps", sigma_data: float = 0.5
) -> Pair:
    """The unconditional prediction of section 5, without a null class: eps(z) = sum over c of p(c | z) eps(z, c).

    Exact for exact scores, and the price is one forward pass per class. `log_posterior(z, logsnr (B,))` gives log p(c | z) up to
    a constant of each row: (B, classes).
    """

    def pair(z: Tensor, logsnr: Tensor, labels: Tensor, both: bool) -> tuple[Prediction, Prediction | None]:
        if not both:
            return _ask(network, z, logsnr, labels, kind, sigma_data), None
        every = [_ask(network, z, logsnr, torch.full_like(labels, c), kind, sigma_data) for c in range(classes)]
        eps = torch.stack([p.eps for p in every], dim=1)  # (B, classes, ...)
        p = log_posterior(z, logsnr.to(z).expand(len(z))).to(z.dtype).softmax(dim=1)
        weak = (eps * p.reshape(*p.shape, *[1] * (z.ndim - 1))).sum(dim=1)
        own = eps[torch.arange(len(z), device=z.device), labels]
        return predict("eps", own, z, logsnr), predict("eps", weak, z, logsnr)

    return pair


# --- rules -----------------------------------------------------------------------------------------------------------------


def linear(strong: Tensor, weak: Tensor, w: float | Tensor, momentum: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The paper's: strong + w (strong - weak) (equation 6)."""
    return strong + w * (strong - weak), None


def projected(eta: float = 0.0, radius: float = math.inf, momentum: float = 0.0) -> Rule:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), made for the space "x".

    The difference D = strong - weak gains `momentum` times the sum kept from earlier levels (negative in the paper), is shortened
    to `radius`, and of its part along the strong prediction only the share `eta` is used. eta = 1, radius = inf and momentum = 0
    give `linear`, bit for bit.

    Raises:
        ValueError: radius <= 0.
    """
    if not radius > 0:
        raise ValueError(f"radius is {radius}, but the largest norm of a guidance step must be positive.")

    def rule(strong: Tensor, weak: Tensor, w: float | Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        kept = strong - weak if kept is None else strong - weak + momentum * kept
        step = kept * (radius / _norm(kept)).clamp(max=1)
        along = strong / _norm(strong).clamp(min=torch.finfo(strong.dtype).tiny)
        parallel = (step * along).flatten(1).sum(1).reshape(-1, *[1] * (strong.ndim - 1)) * along
        return strong + w * (step - (1 - eta) * parallel), kept

    return rule


def rescaled(phi: float, rule: Rule = linear) -> Rule:
    """Give the guided prediction back a share phi of the strong one's standard deviation (Lin et al. 2023, arXiv 2305.08891).

    phi = 0 gives `rule`, bit for bit. The deviation is taken over each sample; a constant prediction is left as it is.

    Raises:
        ValueError: phi outside [0, 1].
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi is {phi}, but the share of the rescaling must be from 0 to 1.")

    def rescale(strong: Tensor, weak: Tensor, w: float | Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        value, kept = rule(strong, weak, w, kept)
        wanted, found = (a.flatten(1).std(1, correction=0).reshape(-1, *[1] * (a.ndim - 1)) for a in (strong, value))
        ratio = torch.where(found > 0, wanted / found, 1)
        return value * (phi * ratio + (1 - phi)), kept

    return rescale


# --- denoisers -------------------------------------------------------------------------------------------------------------


def guided(pair: Pair, w: Weight, *, rule: Rule = linear, space: str = "eps", sigma_data: float = 0.5) -> Denoiser:
    """Compose a pair, a weight and a rule into a denoiser. If the weight is the number 0, only the strong one is computed.

    `sigma_data` is the standard deviation of the data, for the space "edm".
    """

    def denoise(z: Tensor, logsnr: Tensor, labels: Tensor, previous: Prediction | None = None) -> Prediction:
        weight = weight_at(w, logsnr.item())
        strong, weak = pair(z, logsnr, labels, not is_zero(weight))
        if weak is None:
            return strong
        value, momentum = rule(
            output_of(space, strong.x, strong.eps, logsnr, sigma_data),
            output_of(space, weak.x, weak.eps, logsnr, sigma_data),
            broadcast(weight, z) if isinstance(weight, Tensor) else weight,
            None if previous is None else previous.momentum,
        )
        return predict(space, value, z, logsnr, sigma_data)._replace(momentum=momentum)

    return denoise


def classifier_free(
    network: Network,
    w: Weight,
    *,
    null_label: int,
    p_uncond: float,
    rule: Rule = linear,
    space: str = "eps",
    kind: str = "eps",
    sigma_data: float = 0.5,
) -> Denoiser:
    """Classifier-free guidance (equation 6; line 3 of Algorithm 2): 2B rows in one forward pass, or B where w(lambda) = 0.

    Args:
        network: trained with Algorithm 1.
        w: guidance weight of the paper.
        null_label: the label that means "no condition", the number of classes.
        p_uncond: the probability with which training dropped conditions.
        rule, space: how to combine, and which quantity.
        kind: what the network predicts (parametrisation.KINDS).
        sigma_data: standard deviation of the data, where `kind` or `space` is "edm".

    Raises:
        ValueError: w is not the number 0 although p_uncond is 0; when called, labels out of range (looked at once a trajectory).
    """
    if p_uncond == 0 and not (isinstance(w, float | int) and w == 0):
        raise ValueError(
            "w must be 0 for a model trained with p_uncond = 0, because it never saw the null class that guidance needs."
        )
    pair = joint(network, null_label, kind=kind, sigma_data=sigma_data)
    inner = guided(pair, w, rule=rule, space=space, sigma_data=sigma_data)

    def denoise(z: Tensor, logsnr: Tensor, labels: Tensor, previous: Prediction | None = None) -> Prediction:
        if previous is None:
            check_labels(labels, null_label, len(z), wait=True)
        return inner(z, logsnr, labels, previous)

    return denoise


def autoguidance(
    network: Network,
    weak: Network,
    w: Weight,
    *,
    rule: Rule = linear,
    space: str = "eps",
    kind: str = "eps",
    sigma_data: float = 0.5,
) -> Denoiser:
    """Autoguidance (Karras et al. 2024, arXiv 2406.02507): guide away from a weaker network that sees the same condition."""
    pair = two_networks(network, weak, kind=kind, sigma_data=sigma_data)
    return guided(pair, w, rule=rule, space=space, sigma_data=sigma_data)


def cfg_plus_plus(pair: Pair, scale: float) -> Denoiser:
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): x = x_weak + scale (x_strong - x_weak), renoised with the weak eps.

    Only for `ddim`, where it equals equation 6 with 1 + w = scale / (1 - e^-h), h half the step in lambda. scale = 0 is
    unconditional.

    Raises:
        ValueError: scale outside [0, 1].
    """
    if not 0 <= scale <= 1:
        raise ValueError(f"scale is {scale}, but the interpolation of CFG++ must be from 0 to 1.")

    def denoise(z: Tensor, logsnr: Tensor, labels: Tensor, previous: Prediction | None = None) -> Prediction:
        strong, weak = pair(z, logsnr, labels, True)
        assert weak is not None
        return Prediction(weak.x + scale * (strong.x - weak.x), weak.eps, tied=False)

    return denoise


def classifier_guided(
    network: Network,
    classifier: Callable[[Tensor, Tensor], Tensor],
    w: Weight,
    *,
    null_label: int | None = None,
    kind: str = "eps",
    sigma_data: float = 0.5,
) -> Denoiser:
    """Classifier guidance (section 3.1; Dhariwal & Nichol 2021): eps~ = eps(z, c) - w sigma grad_z log p(c | z).

    Args:
        network: the diffusion model.
        classifier: classifier(z, logsnr (B,)) -> logits (B, classes), trained on noisy z. Called outside autocast, in z's dtype.
        w: guidance weight. Guiding the unconditional model with w + 1 equals guiding the conditional one with w.
        null_label: when given, the network is asked without the condition.
    """

    def denoise(z: Tensor, logsnr: Tensor, labels: Tensor, previous: Prediction | None = None) -> Prediction:
        condition = labels if null_label is None else torch.full_like(labels, null_label)
        plain = _ask(network, z, logsnr, condition, kind, sigma_data)
        weight = weight_at(w, logsnr.item())
        if is_zero(weight):
            return plain
        with torch.enable_grad(), torch.autocast(z.device.type, enabled=False):
            leaf = z.detach().requires_grad_()
            logits = classifier(leaf, logsnr.to(z).expand(len(z))).to(z.dtype)
            (gradient,) = torch.autograd.grad(logits.log_softmax(1).gather(1, labels[:, None]).sum(), leaf)
        weight = broadcast(weight, z) if isinstance(weight, Tensor) else weight
        return predict("eps", plain.eps - weight * alpha_sigma(logsnr)[1] * gradient, z, logsnr)

    return denoise


def clipped(denoise: Denoiser, limit: float = 1.0) -> Denoiser:
    """Clamp x to [-limit, limit]; eps moves along, unless it is untied. The paper does not say whether it clips; ADM does."""

    def clip(z: Tensor, logsnr: Tensor, labels: Tensor, previous: Prediction | None = None) -> Prediction:
        p = denoise(z, logsnr, labels, previous)
        return _move_x(p, p.x.clamp(-limit, limit), logsnr)

    return clip


def dynamic_threshold(denoise: Denoiser, quantile: float = 0.995, limit: float = 1.0) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487): clamp x to a quantile tau of its own size, then scale it back.

    tau = max(limit, quantile of |x| in each sample); x becomes clamp(x, -tau, tau) limit / tau. Samples within the limit pass.

    Raises:
        ValueError: quantile outside [0, 1] or limit <= 0.
    """
    if not 0 <= quantile <= 1 or not limit > 0:
        raise ValueError(f"quantile is {quantile} and limit {limit}, but they must be from 0 to 1, and positive.")

    def threshold(z: Tensor, logsnr: Tensor, labels: Tensor, previous: Prediction | None = None) -> Prediction:
        p = denoise(z, logsnr, labels, previous)
        # Row by row: torch.quantile refuses large inputs.
        tau = torch.stack([row.quantile(quantile) for row in p.x.flatten(1).abs()]).clamp(min=limit)
        tau = tau.reshape(-1, *[1] * (z.ndim - 1))
        return _move_x(p, p.x.clamp(-tau, tau) / (tau / limit), logsnr)

    return threshold


def _ask(network: Network, z: Tensor, logsnr: Tensor, labels: Tensor, kind: str, sigma_data: float) -> Prediction:
    return predict(kind, network(z, logsnr.to(z).expand(len(z)), labels), z, logsnr, sigma_data)


def _move_x(p: Prediction, x: Tensor, logsnr: Tensor) -> Prediction:
    """Replace x, and keep z = alpha x + sigma eps by moving eps. Where x stays, eps keeps its bits."""
    if not p.tied:
        return p._replace(x=x)
    alpha, sigma = alpha_sigma(logsnr)
    return p._replace(x=x, eps=p.eps + alpha / sigma * (p.x - x))


def _norm(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1).reshape(-1, *[1] * (a.ndim - 1))
