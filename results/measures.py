"""What a code tells of a known factor, and what it keeps when the factor changes. Pure functions.

Read in this order: adjusted_information, told, ridge, decoded, alterations, kept,
effective_dimension. results/factors.py applies them to tokenizers.
"""
# Shapes:  n images, N patches per image, K codes, C width, F features, T numbers to predict
import numpy as np
import torch
import torch.nn.functional as F

# What the paper's argument wants of the better code: -1 to ignore the factor, +1 to keep it.
CLAIM = {"class": +1, "colour": -1, "light": -1, "polarity": -1, "rotation": -1, "scale": -1,
         "position": -1, "texture": -1}


# --- what a code tells ----------------------------------------------------------------------------
def information(z, f):
    """Mutual information in nats of two discrete variables, counted.  z, f (n,) integers from 0"""
    bins = f.max() + 1
    pairs = np.bincount(z * bins + f, minlength=(z.max() + 1) * bins).reshape(-1, bins)
    joint = pairs / len(z)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    ratio = np.where(joint > 0, joint / np.maximum(product, 1e-300), 1)
    return float((joint * np.log(ratio)).sum())


def adjusted_information(z, f, seen=None, shuffles=2, seed=0):
    """Which part of factor f's entropy the code z_p at place p tells. -> 0 by chance, 1 for all

    z (n, N), f (n,) bin of each image, seen (n, N): the patches that count. I(z_p; f) and H(f) are
    counted at each place, over the images whose patch p is seen, and summed over places with the
    number of images as weight. Counted information is too high by a bias. The same count after f is
    shuffled among those images estimates the bias: (I - bias) / (H - bias).
    """
    if seen is None:
        seen = np.ones(z.shape, dtype=bool)
    rng = np.random.default_rng(seed)
    total = np.zeros(3)                      # I, H, bias
    for p in range(z.shape[1]):
        rows = np.flatnonzero(seen[:, p])
        if len(rows) < 2:
            continue
        a = z[rows, p]
        b = f[rows]
        bias = np.mean([information(a, rng.permutation(b)) for _ in range(shuffles)])
        total += len(rows) * np.array([information(a, b), information(b, b), bias])
    told, entropy, bias = total
    return float((told - bias) / max(entropy - bias, 1e-12))


def told(z, values, cover):
    """adjusted_information of every factor.  z (n, N), values as of factor_values, cover (n, N)

    cover is the object's share of each patch. Only patches that can tell are counted: those with a
    tenth or more on the object; for the background's texture those with half or more outside it.
    """
    result = {}
    for name, (_, bins) in values.items():
        seen = cover <= 0.5 if name == "texture" else cover >= 0.1
        result[name] = adjusted_information(z, bins, seen)
    return result


def quantile_bins(x, bins=8):
    """Continuous values (n,) -> bin 0 .. bins - 1, equally many in each."""
    edges = np.quantile(x, np.arange(1, bins) / bins)
    return np.searchsorted(edges, x, side="right")


def factor_values(labels, f):
    """What there is to know of each image.  -> {factor: (numbers to predict (n, T), bins (n,))}

    A one-hot matrix stands for a name. light is the mean level of object and background, polarity
    tells which of the two is brighter. Colour is predicted as the point saturation * (cos, sin) of
    the object's hue, because at saturation 0 no hue can be seen. Its bins are those of the hue.
    """
    values = {}
    polarity = (f["brightness"] > f["background"]).astype(int)
    for name, number in {"class": labels, "polarity": polarity, "texture": f["texture"]}.items():
        values[name] = np.eye(number.max() + 1)[number], number
    light = (f["brightness"] + f["background"]) / 2
    for name, x in {"light": light, "rotation": f["rotation"], "scale": f["scale"]}.items():
        values[name] = x[:, None], quantile_bins(x)
    thirds = 3 * quantile_bins(f["x"], 3) + quantile_bins(f["y"], 3)
    values["position"] = np.stack([f["x"], f["y"]], 1), thirds
    turn = 2 * np.pi * f["hue"]
    point = f["saturation"][:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    values["colour"] = point, quantile_bins(f["hue"])
    return {name: values[name] for name in CLAIM}


# --- what can be decoded --------------------------------------------------------------------------
def ridge(x, y, x_new, strengths=(1e-3, 1e-2, 1e-1, 1, 10)):
    """Least squares with S penalties, in closed form.

    x (n, F), y (n, T), x_new (m, F) -> predictions (S, m, T). A penalty of 1 is the mean
    eigenvalue. With more features than images the n x n problem is solved instead of F x F.
    """
    mean = x.mean(0)
    centre = y.double().mean(0)
    x = x - mean
    x_new = x_new - mean
    y = y.double() - centre
    if x.shape[1] > len(x):
        gram = (x @ x.T).double()            # (n, n)
        right = y
        left = x_new @ x.T
    else:
        gram = (x.T @ x).double()            # (F, F)
        right = x.T.double() @ y
        left = x_new
    unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double)
    predictions = []
    for strength in strengths:
        factor = torch.linalg.cholesky(gram + strength * unit)
        predictions.append(left.double() @ torch.cholesky_solve(right, factor) + centre)
    return torch.stack(predictions)


def score(guess, y):
    """guess (S, m, T), y (m, T) -> (S,): accuracy if y is one-hot, else R^2 over all T numbers."""
    if set(y.unique().tolist()) <= {0, 1}:
        return (guess.argmax(-1) == y.argmax(-1)).double().mean(-1)
    error = (guess - y).square().sum((1, 2))
    return 1 - error / (y - y.mean(0)).square().sum()


def decoded(x, values, train):
    """How well ridge regression reads each factor off x (n, F).  -> {factor: score}

    It learns from the first `train` images, of which a sixth chooses the penalty, and is tested on
    the others.
    """
    targets = [torch.from_numpy(np.asarray(y, np.float64)) for y, _ in values.values()]
    fit = train - train // 6
    guesses = ridge(x[:fit], torch.cat(targets, 1)[:fit], x[fit:])       # (S, n - fit, all T)
    parts = guesses.split([y.shape[1] for y in targets], dim=-1)
    result = {}
    for name, guess, y in zip(values, parts, targets, strict=True):
        best = score(guess[:, :train - fit], y[fit:train]).argmax()
        result[name] = score(guess[:, train - fit:], y[train:])[best].item()
    return result


def beside_codes(x, centres):
    """What to read h or t off: x (n, N, C) and its soft choice of a centre (K, C).

    -> (n, N (C + K)). A one-hot code is no linear function of h: a linear head on codes can say
    "this edge, whichever side is darker", one on h cannot. With the soft choice beside it, h has
    what the codes have and is only spared the rounding.
    """
    return torch.cat([x, (10 * x @ centres.T).softmax(-1)], dim=-1).flatten(1)


# --- what a code keeps ----------------------------------------------------------------------------
def alterations(labels, f):
    """{name: values for draw_shapes(change=...)}: one factor of every image anew, and no other.

    New values come mostly from another image. The object stays inside the picture: its new scale
    fits at its place, its new place fits its scale. light: new levels, the brighter side stays the
    brighter. polarity: object and background exchange their levels.
    """
    n = len(labels)
    other = {name: np.roll(x, n // 2) for name, x in f.items()}
    room = 25.5 - 24 * f["scale"]            # as in draw_shapes
    other_room = 25.5 - 24 * other["scale"]
    farthest = np.maximum(np.abs(f["x"]), np.abs(f["y"]))
    largest = np.minimum(0.95, (25.5 - farthest) / 24)
    low, high = np.sort([other["brightness"], other["background"]], axis=0)
    brighter = f["brightness"] > f["background"]
    return {
        "class": {"class": (labels + 1 + np.arange(n) // 10 % 9) % 10},
        "colour": {k: other[k] for k in ("hue", "saturation", "background_hue")},
        "light": dict(brightness=np.where(brighter, high, low),
                      background=np.where(brighter, low, high)),
        "polarity": dict(brightness=f["background"], background=f["brightness"]),
        "rotation": dict(rotation=other["rotation"]),                    # within +-15 degrees
        "large rotation": dict(rotation=12 * other["rotation"]),         # within +-180 degrees
        "scale": dict(scale=0.6 + (largest - 0.6) * (other["scale"] - 0.6) / 0.35),
        "position": {k: other[k] * room / other_room for k in "xy"},
        "texture": dict(texture=(f["texture"] + 1 + np.arange(n) % 4) % 5),
        "noise": dict(noise=np.roll(np.arange(n), n // 2)),
    }


def kept(z, changed, seen=None):
    """Share of codes that two encodings z, changed (n, N) have in common.

    place: at the same place. bag: as bags of codes (the overlap of their histograms), so that a
    code that moves with its patch counts as kept. seen (n, N): only these patches count, because a
    background that a change does not touch says nothing about the codes.
    """
    if seen is None:
        seen = torch.ones_like(z, dtype=torch.bool)
    codes = int(max(z.max(), changed.max())) + 1
    bag, changed_bag = [(F.one_hot(x, codes) * seen[..., None]).sum(1) for x in (z, changed)]
    return dict(place=(z == changed)[seen].double().mean().item(),
                bag=(torch.minimum(bag, changed_bag).sum() / seen.sum()).item())


def effective_dimension(x):
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of x (n, F).

    1 for points on a line, F for a round cloud.
    """
    x = x.double() - x.double().mean(0)
    covariance = x.T @ x / len(x)
    return (covariance.trace() ** 2 / covariance.square().sum()).item()
