"""The Conformer's formulas in NumPy, float64, one recording without padding at a time."""

import numpy as np


def layer_norm(x, params):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    scale = 1 + params["offset"] if "offset" in params else params["scale"]
    return x * scale + params["bias"]


def dense(x, params):
    kernel = params["kernel"]
    flat = x.reshape(len(x), -1) @ kernel.reshape(x[0].size, -1)
    return flat.reshape(len(x), *params["bias"].shape) + params["bias"]


def swish(x):
    return x / (1 + np.exp(-x))


def halved(x, params, before):
    """(F, C, channels), zeros beyond; `before` of them before the frames."""
    frames, bins, channels = x.shape
    padded = np.zeros((frames + 4, bins + 3, channels))
    padded[before : before + frames, bins % 2 : bins % 2 + bins] = x
    out = np.zeros((-(-frames // 2), -(-bins // 2), params["kernel"].shape[-1]))
    for t in range(out.shape[0]):
        for b in range(out.shape[1]):
            window = padded[2 * t : 2 * t + 3, 2 * b : 2 * b + 3]
            out[t, b] = np.einsum("tbc,tbcd->d", window, params["kernel"]) + params["bias"]
    return np.maximum(out, 0)


def sines(length, dim):
    frequencies = 10_000.0 ** (-np.arange(dim // 2) / (dim // 2 - 1))
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def feed_forward(x, params):
    return dense(swish(dense(layer_norm(x, params["norm"]), params["up"])), params["down"])


def attention(x, params, kind):
    def project(name):
        return np.einsum("tm,mhd->thd", x, params[name]) + params[f"{name}_bias"]

    query, key, value = project("query"), project("key"), project("value")
    if "query_norm" in params:
        query, key = layer_norm(query, params["query_norm"]), layer_norm(key, params["key_norm"])
    if "log_temperature" in params:
        query = query * np.log1p(np.exp(params["log_temperature"])) / np.log(2)
    logits = np.einsum("thd,shd->hts", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    if kind == "laser":
        out = np.log(np.einsum("hts,shd->thd", weights, np.exp(value)))
    else:
        out = np.einsum("hts,shd->thd", weights, value)
    return np.einsum("thd,mhd->tm", out, params["output"]) + params["output_bias"]


def gated(x, params):
    """Up to the convolution over time."""
    x = layer_norm(x, params["norm"])
    x = dense(x, params["value"]) / (1 + np.exp(-dense(x, params["gate"])))
    size = len(params["kernel"])
    padded = np.pad(x, ((size // 2, size // 2), (0, 0)))
    return sum(padded[i : i + len(x)] * params["kernel"][i] for i in range(size))


def conformer(params, recordings, kind, moments=None):
    """Logits of each recording, (positions, V), and the moments that batch norm used, a list.

    `recordings` are (frames, C) each; `moments` (mean, variance) of each block, or those of the
    batch if None.
    """
    params = tree(params)
    subsampling, blocks = params["subsampling"], params["blocks"]
    xs = []
    for x in recordings:
        x = halved(np.asarray(x, np.float64)[..., None], subsampling["first"], 0)
        x = dense(halved(x, subsampling["second"], 1), subsampling["output"])
        xs.append(x + sines(*x.shape))
    used = []
    for layer in range(len(blocks["norm"]["offset"])):
        block = tree(blocks, lambda leaf: leaf[layer])  # noqa: B023
        xs = [x + 0.5 * feed_forward(x, block["first"]) for x in xs]
        normed = [layer_norm(x, block["attention_norm"]) for x in xs]
        xs = [x + attention(y, block["attention"], kind) for x, y in zip(xs, normed)]
        convolution = block["convolution"]
        hidden = [gated(x, convolution) for x in xs]
        frames = np.concatenate(hidden)
        mean, variance = moments[layer] if moments else (frames.mean(0), frames.var(0))
        used.append((mean, variance))
        norm = convolution["batch_norm"]
        for i, h in enumerate(hidden):
            h = (h - mean) / np.sqrt(variance + 1e-3) * (1 + norm["offset"]) + norm["bias"]
            xs[i] = xs[i] + dense(swish(h), convolution["output"])
        xs = [x + 0.5 * feed_forward(x, block["second"]) for x in xs]
        xs = [layer_norm(x, block["norm"]) for x in xs]
    return [dense(layer_norm(x, params["final_norm"]), params["head"]) for x in xs], used


def tree(params, function=lambda leaf: np.asarray(leaf, np.float64)):
    if isinstance(params, dict):
        return {name: tree(part, function) for name, part in params.items()}
    return function(params)
