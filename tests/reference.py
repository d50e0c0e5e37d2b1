"""What the papers say, in float64 NumPy and plain loops. Imports nothing of ours."""

import math

import numpy as np

# --- schedules -----------------------------------------------------------------------


def linear(start, end, fraction):
    return start + (end - start) * fraction


def cosine(start, end, fraction):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def one_minus_sqrt(start, end, fraction):
    return end + (start - end) * (1 - math.sqrt(fraction))


def exponential(start, end, fraction):
    return start ** (1 - fraction) * end**fraction


def quadratic(start, end, fraction):
    return end + (start - end) * (1 - fraction) ** 2


SHAPES = {
    "linear": linear,
    "cosine": cosine,
    "1-sqrt": one_minus_sqrt,
    "exponential": exponential,
    "quadratic": quadratic,
}


def phases(count, init_value, phase_list):
    """Walks through [(steps, end_value, shape name), ...]."""
    begin, start = 0, init_value
    value = init_value
    for steps, end, shape in phase_list:
        if count >= begin + steps:
            value = end
        elif count > begin:
            value = SHAPES[shape](start, end, (count - begin) / steps)
        begin, start = begin + steps, end
    return value


def onecycle(count, peak, total, warmup, init, end, annihilation, shape):
    """Smith and Topin (2018): up, back to where it began, and annihilated."""
    walk = [(warmup, peak, shape)]
    if annihilation and warmup + annihilation < total:
        walk += [(total - warmup - annihilation, init, shape)]
    walk += [(annihilation or total - warmup, end, shape)]
    return phases(count, init, walk)


def cyclical(count, base, peak, up, down, mode, gamma):
    """Smith (2017), section 3, with the amplitude of its popular code."""
    cycle, position = divmod(count, up + down)
    x = position / up if position <= up else (up + down - position) / down
    scale = {"triangular": 1, "triangular2": 0.5**cycle, "exp_range": gamma**count}
    return base + (peak - base) * x * scale[mode]


def torch_onecycle(
    count, max_lr, total, pct_start=0.3, anneal=cosine, div=25, final_div=1e4,
    three_phase=False,
):  # fmt: skip
    """PyTorch's OneCycleLR at its ``count``-th step, by its documentation."""
    initial = max_lr / div
    ends = [(pct_start * total - 1, initial, max_lr)]
    if three_phase:
        ends += [(2 * pct_start * total - 2, max_lr, initial)]
        ends += [(total - 1, initial, initial / final_div)]
    else:
        ends += [(total - 1, max_lr, initial / final_div)]
    begin = 0.0
    while count > ends[0][0]:
        begin = ends.pop(0)[0]
    end, start_value, end_value = ends[0]
    return anneal(start_value, end_value, (count - begin) / (end - begin))


def torch_cyclical_momentum(
    count, total, pct_start=0.3, base=0.85, high=0.95, anneal=cosine
):
    """The momentum of PyTorch's OneCycleLR (two phases)."""
    top = pct_start * total - 1
    if count <= top:
        return anneal(high, base, count / top)
    return anneal(base, high, (count - top) / (total - 1 - top))


def slanted_triangular(count, total, cut_frac=0.1, ratio=32, max_lr=0.01):
    """Howard and Ruder (2018), equation 3."""
    cut = math.floor(total * cut_frac)
    p = count / cut if count < cut else 1 - (count - cut) / (cut * (1 / cut_frac - 1))
    return max_lr * (1 + p * (ratio - 1)) / ratio


def combined_cos(fraction, pct, start, middle, end):
    """fastai: cosine from start to middle over ``pct``, then to the end."""
    if fraction < pct:
        return cosine(start, middle, fraction / pct)
    return cosine(middle, end, (fraction - pct) / (1 - pct))


def sgdr(count, max_value, min_value, first_cycle, mult):
    """Loshchilov and Hutter (2017), equation 5."""
    length = first_cycle
    while count >= length:
        count, length = count - length, length * mult
    return cosine(max_value, min_value, count / length)


def torch_warm_restarts(count, base, eta_min, t_0, t_mult):
    """PyTorch's CosineAnnealingWarmRestarts after ``count`` steps, by its counters."""
    t_cur, t_i = 0, t_0
    for _ in range(count):
        t_cur += 1
        if t_cur >= t_i:
            t_cur, t_i = t_cur - t_i, t_i * t_mult
    return eta_min + (base - eta_min) * (1 + math.cos(math.pi * t_cur / t_i)) / 2


def torch_swalr(count, lr, swa_lr, anneal_epochs, anneal_strategy="cos"):
    """PyTorch's SWALR after ``count`` steps: undoes its last step, then takes the next.

    Its rate starts from what it finds in the optimizer, ``lr``.
    """

    def alpha(step):
        t = max(0.0, min(1.0, step / anneal_epochs))
        return t if anneal_strategy == "linear" else (1 - math.cos(math.pi * t)) / 2

    for step in range(1, count + 1):
        old, new = alpha(step - 1), alpha(step)
        first = swa_lr if old == 1 else (lr - old * swa_lr) / (1 - old)
        lr = swa_lr * new + first * (1 - new)
    return lr


def transformers_cosine(count, lr, total, warmup, num_cycles=0.5):
    """The rate of transformers' get_cosine_schedule_with_warmup."""
    if count < warmup:
        return lr * count / warmup
    progress = (count - warmup) / (total - warmup)
    return lr * max(0.0, 0.5 * (1 + math.cos(math.pi * num_cycles * 2 * progress)))


def swa_schedule(count, start, lr, swa_lr):
    """Izmailov et al. (2018): flat for half, then linear to ``swa_lr`` by 90 %."""
    t, r = count / start, swa_lr / lr
    if t <= 0.5:
        return lr
    return lr * (1 - (1 - r) * (t - 0.5) / 0.4 if t <= 0.9 else r)


def warmup_stable_decay(count, peak, total, warmup, decay, init, end, shape):
    """Hu et al. (2024), with a decay that ends at ``total``."""
    stable = (total - warmup - decay, peak, "linear")
    return phases(count, init, [(warmup, peak, "linear"), stable, (decay, end, shape)])


def cooled(count, schedule, total, cooldown, end, shape):
    """Hägele et al. (2024): ``schedule`` up to the cooldown, then from where it is."""
    begin = total - cooldown
    if count <= begin:
        return schedule(count)
    fraction = min((count - begin) / cooldown, 1)
    return SHAPES[shape](schedule(begin), end, fraction)


def refined(norms, power):
    """Defazio et al. (2023): w_t times the sum of the later w, over its maximum."""
    later, rates = 0.0, []
    for norm in reversed(norms):
        rates.append(norm**-power * later)
        later += norm**-power
    return np.array(rates[::-1]) / max(rates)


def refined_schedule(count, norms, power, peak, total):
    """The refined rates at equal distances, and lines between."""
    steps = np.linspace(0, total, len(norms))
    return peak * np.interp(count, steps, refined(norms, power))


def smoothed_norms(norms, fraction, samples=10_000):
    """The paper's running median: trimmed, resampled, reflected at the end."""
    norms = norms[2:-2]
    if len(norms) < samples:
        grid = np.linspace(0, 1, len(norms))
        norms = np.interp(np.linspace(0, 1, samples), grid, norms)
    half = math.floor(fraction * len(norms) / 2)
    left = np.full(half, norms[0])
    right = norms[-2::-1][: 2 * (2 * half + 1)]
    signal = np.concatenate([left, norms, right])
    windows = (signal[k : k + 2 * half + 1] for k in range(len(norms)))
    return np.array([np.median(window) for window in windows])


def best_factor(rates):
    """Of rates above 0, in D / G; theorem 10 of Defazio et al. (2023), minimised."""
    steps = range(len(rates))
    t_1 = 1 / (2 * sum(rates))
    t_2 = sum(rate**2 for rate in rates) / (2 * sum(rates))
    t_3 = 0.0
    for k in steps[:-1]:
        after = sum(rates[p] for p in steps[k + 1 :])
        squares = sum(rates[p] ** 2 for p in steps[k:])
        t_3 += 0.5 * rates[k] / after * squares / sum(rates[p] for p in steps[k:])
    return math.sqrt(t_1 / (t_2 + t_3))


def transformers_wsd(
    count, lr, total, warmup, decay, warmup_type="linear", decay_type="cosine",
    min_lr_ratio=0.0, num_cycles=0.5,
):  # fmt: skip
    """The rate of transformers' get_wsd_schedule, by its documentation."""
    stable = total - warmup - decay
    if count < warmup:
        up = count / warmup
        factor = {
            "linear": up,
            "cosine": 0.5 * (1 - math.cos(math.pi * up)),
            "1-sqrt": 1 - math.sqrt(1 - up),
        }[warmup_type]
    elif count < warmup + stable:
        factor = 1.0
    else:
        down = min((count - warmup - stable) / decay, 1.0)
        factor = {
            "linear": 1 - down,
            "cosine": 0.5 * (1 + math.cos(2 * math.pi * num_cycles * down)),
            "1-sqrt": 1 - math.sqrt(down),
        }[decay_type]
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * factor)


def timm_wsd(count, lr, t_initial, decay_t, warmup_t, lr_min=0.0, decay_fn="1-sqrt"):
    """The rate of timm's WSDLRScheduler with its constant stable phase."""
    if count < warmup_t:
        return lr * count / warmup_t
    fraction = min(max(count - warmup_t - (t_initial - decay_t), 0) / decay_t, 1)
    factor = {
        "1-sqrt": 1 - math.sqrt(fraction),
        "linear": 1 - fraction,
        "exp": (0.1**fraction - 0.1) / 0.9,
    }[decay_fn]
    return lr_min + (lr - lr_min) * factor


def maxtext_wsd(count, lr, total, warmup, decay, final, style="linear", tail=False):
    """MaxText's WSD: at its end in the last of its steps, then 0 if more follow."""
    if count >= total and tail:
        return 0.0
    if count < warmup:
        return lr * count / warmup
    fraction = min(max(count - (total - decay), 0) / (decay - 1), 1)
    return SHAPES[style](lr, final, fraction)


def levanter_wsd(count, lr, total, warmup, decay, min_lr_ratio=0.1):
    """Levanter's linear decay in one cycle, by the milestones of its pieces."""
    knots = [0, warmup, total - decay, total]
    return np.interp(count, knots, [0.0, lr, lr, lr * min_lr_ratio])


def minicpm_wsd(count, lr, total, warmup, decay, half_life):
    """Hu et al. (2024), equation of WSD with f(s) = 0.5 ** (s / half_life)."""
    if count < warmup:
        return count / warmup * lr
    return lr * 0.5 ** (max(count - (total - decay), 0) / half_life)


def hagele_wsd(count, lr, total, warmup, decay):
    """Hägele et al. (2024): their three pieces, with the 1-sqrt cooldown."""
    if count < warmup:
        return count / warmup * lr
    if count <= total - decay:
        return lr
    return lr * (1 - math.sqrt((count - (total - decay)) / decay))


# --- optimizers ----------------------------------------------------------------------


def sgd(params, grads, lr, momentum, decay=None, nesterov=False):
    """Coupled decay, then momentum, as Sutskever et al. (2013) in PyTorch's form.

    ``grads`` is a sequence of arrays, the dials are functions of the step; returns the
    parameters after each step.
    """
    trace, history = np.zeros_like(params), []
    for t, g in enumerate(grads):
        g = g + (decay(t) * params if decay else 0.0)
        trace = g + momentum(t) * trace
        update = g + momentum(t) * trace if nesterov else trace
        params = params - lr(t) * update
        history.append(params)
    return np.stack(history)


def adamw(params, grads, lr, b1, b2, eps=1e-8, decay=None, nesterov=False):
    """Kingma and Ba (2015) with moving betas, debiased by the mean of a constant 1.

    With Nesterov as Dozat (2016), algorithm 2; decay decoupled, times the rate.
    """
    mu = nu = np.zeros_like(params)
    not_mu = not_nu = 1.0  # Products of the betas: 1 minus the mean of a constant 1.
    history = []
    for t, g in enumerate(grads):
        mu = b1(t) * mu + (1 - b1(t)) * g
        nu = b2(t) * nu + (1 - b2(t)) * g**2
        not_mu, not_nu = not_mu * b1(t), not_nu * b2(t)
        first = mu / (1 - not_mu)
        if nesterov:
            first = b1(t + 1) * mu / (1 - not_mu * b1(t + 1))
            first = first + (1 - b1(t)) * g / (1 - not_mu)
        update = first / (np.sqrt(nu / (1 - not_nu)) + eps)
        update = update + (decay(t) * params if decay else 0.0)
        params = params - lr(t) * update
        history.append(params)
    return np.stack(history)


# --- groups of parameters ------------------------------------------------------------

# scale_i = decay ** (13 - i) of timm's ViT-B (12 blocks, stem and head), to 6 digits.
LAYER_DECAY = {
    0.75: (
        0.0237573, 0.0316764, 0.0422351, 0.0563135, 0.0750847, 0.100113, 0.133484,
        0.177979, 0.237305, 0.316406, 0.421875, 0.5625, 0.75, 1.0,
    ),
    0.65: (
        0.00369720, 0.00568800, 0.00875077, 0.0134627, 0.0207119, 0.0318644, 0.0490222,
        0.0754189, 0.116029, 0.178506, 0.274625, 0.4225, 0.65, 1.0,
    ),
}  # fmt: skip


def layer_decay(groups, decay, least=0.0):
    """Howard and Ruder (2018), section 3.2: each group a factor below the next."""
    scales = [1.0]
    while len(scales) < groups:
        scales.insert(0, scales[0] * decay)
    return [max(scale, least) for scale in scales]


def fastai_slice(start, stop, groups):
    """Fastai's rates of ``slice(start, stop)``: ``even_mults``, or a tenth."""
    if start is None:
        return [stop / 10] * (groups - 1) + [stop]
    if groups == 1:
        return [stop]
    step = (stop / start) ** (1 / (groups - 1))
    return [start * step**i for i in range(groups)]


def thawing(params, grads, thaw, train):
    """Nothing for ``thaw`` steps, and then ``train(params, grads, thaw)``."""
    still = np.repeat(params[None], min(thaw, len(grads)), axis=0)
    if thaw >= len(grads):
        return still
    return np.concatenate([still, train(params, grads[thaw:], thaw)])


def fine_tune_dial(count, low, high, total, freeze, warmup, end):
    """Once up over the frozen steps, then a cycle over what is left."""
    if count < freeze:
        return cosine(low, high, count / freeze)
    return onecycle(count - freeze, high, total - freeze, warmup, low, end, 0, "cosine")


def fine_tune(
    params, grads, peak, total, freeze, warmup, *, multiplier, thaw, decay=0.0
):  # fmt: skip
    """The head (thaw 0) or another group of a network that is fine-tuned by AdamW.

    The moments of a group begin at its thaw, its rate and b1 follow the run.
    """

    def rate(count):
        return fine_tune_dial(count, peak / 25, peak, total, freeze, warmup, 0.0)

    def b1(count):
        return fine_tune_dial(count, 0.95, 0.85, total, freeze, warmup, 0.95)

    def train(params, grads, begin):
        return adamw(
            params,
            grads,
            lambda t: multiplier * rate(t + begin),
            lambda t: b1(t + begin),
            lambda t: 0.99,
            decay=lambda t: decay,
        )

    return thawing(params, grads, thaw, train)


# --- range test ----------------------------------------------------------------------


def debiased_average(losses, smoothing):
    """The exponential average over its own sum of weights."""
    smoothed = []
    for i in range(1, len(losses) + 1):
        weights = smoothing ** np.arange(i)[::-1]
        smoothed.append(np.sum(weights * losses[:i]) / np.sum(weights))
    return np.asarray(smoothed)


def divergence_step(losses, smoothing, factor, patience):
    """The number of steps after which a range test stops, or None."""
    smoothed = debiased_average(losses, smoothing)
    above = 0
    for i, loss in enumerate(losses):
        if not np.isfinite(loss):
            return i + 1
        best = smoothed[: i + 1].min()
        first = smoothed[0]
        bound = best + (factor - 1) * max(abs(first), first - best)
        above = above + 1 if smoothed[i] > bound else 0
        if above == patience:
            return i + 1
    return None


# --- curvature -----------------------------------------------------------------------


def iteration(optimizer, step, b):
    """One optimizer on a quadratic, ``step`` = rate times curvature, as a matrix.

    It acts on the parameter and the momentum; Nesterov in the form of PyTorch.
    """
    if optimizer == "gd":
        return np.array([[1 - step]])
    gain = 1 - b if optimizer == "adam" else 1.0  # A mean of gradients, or a sum.
    momentum = np.array([gain, b])  # Of the gradient and of the old momentum.
    update = momentum.copy()
    if optimizer == "nesterov":
        update = np.array([1.0, 0.0]) + b * momentum
    return np.array([[1.0, 0.0], momentum]) - step * np.outer([1.0, 0.0], update)


def largest_stable_step(optimizer, b):
    """Rate times curvature at which the spectral radius passes 1, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        radius = np.abs(np.linalg.eigvals(iteration(optimizer, middle, b))).max()
        low, high = (middle, high) if radius < 1 else (low, middle)
    return low


def spectra(n, rng):
    """Eigenvalues of matrices as training meets them, by name."""
    samples = rng.normal(size=(2 * n, n))
    symmetric = rng.normal(size=(n, n))
    cluster = np.linspace(0.0, 0.5, n)
    cluster[-max(2, n // 20) :] = np.linspace(0.98, 1.0, max(2, n // 20))
    spike = np.full(n, 1e-3)
    spike[-1] = 1.0
    return {
        "log": np.geomspace(1e-4, 1.0, n),
        "uniform": np.linspace(0.0, 1.0, n),
        "wigner": np.linalg.eigvalsh((symmetric + symmetric.T) / np.sqrt(2 * n)),
        "wishart": np.linalg.eigvalsh(samples.T @ samples / (2 * n)),
        "cluster": cluster,
        "spike": spike,
        "identity": np.ones(n),
        "negative": -np.linspace(1.0, 2.0, n),
    }


# --- cooldowns and averages ----------------------------------------------------------


def average(samples, gains):
    """The exponential average as a sum over samples, over the sum of its weights.

    Kingma and Ba (2015), section 3: the weight of a sample is its gain (1 - beta),
    times the betas of all later ones.
    """
    later = np.cumprod((1 - np.asarray(gains))[::-1])[::-1]
    weights = np.asarray(gains) * np.append(later[1:], 1.0)
    return np.tensordot(weights / weights.sum(), samples, axes=1)


def polynomial_decay_average(samples, power):
    """Shamir and Zhang (2013), section 4, from t = 1."""
    mean = np.zeros_like(samples[0])
    for t, sample in enumerate(samples, start=1):
        share = (power + 1) / (t + power)
        mean = (1 - share) * mean + share * sample
    return mean


def batch_stats(weights, batches, eps=1e-5):
    """(mean, variance) of each norm's inputs, as Izmailov et al. (2018) find them.

    ``weights``: (kernel, bias, scale, offset) of dense layers, each with a norm and a
    tanh. Every batch is normalised by its own moments.
    """
    parts = [np.asarray(batch, np.float64) for batch in batches]
    found = []
    for layer in weights:
        kernel, bias, scale, offset = (np.asarray(w, np.float64) for w in layer)
        parts = [part @ kernel + bias for part in parts]
        population = np.concatenate(parts)
        found.append((population.mean(0), population.var(0)))
        parts = [
            np.tanh((p - p.mean(0)) / np.sqrt(p.var(0) + eps) * scale + offset)
            for p in parts
        ]
    return found
