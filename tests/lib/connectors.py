"""Connectors, and a plain implementation of each, written from the equations: a view and a token at a time."""

import torch

from lit_eemllm.mechanisms import CONNECTORS, Connector, build_connector

CASES = {
    "mlp": ("mlp", {}),
    "linear": ("linear", {}),
    "pixel_shuffle": ("pixel_shuffle", {}),
    "pixel_shuffle, cut squares": ("pixel_shuffle", {"factor": 3}),
    "linear_shuffle": ("linear_shuffle", {}),
    "merger": ("merger", {}),
    "merger, cut squares": ("merger", {"factor": 3, "rms": True}),
    "average": ("average", {}),
    "average, cut squares": ("average", {"factor": 3}),
    "attention": ("attention", {"tokens": 3, "heads": 2}),
}
"""Name and options. The grids of tiny encoders are 4 x 4 at least, which 3 does not divide."""


def case(name: str) -> Connector:
    connector, options = CASES[name]
    return build_connector({"name": connector, "options": options})


assert {name for name, _ in CASES.values()} == set(CONNECTORS)


def mlp(module, x):
    x = x @ module.linear_1.weight.T + module.linear_1.bias
    x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    return x @ module.linear_2.weight.T + module.linear_2.bias


def normed(norm, x):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + norm.eps) ** 0.5 * norm.weight + norm.bias


def squares_of(view, side):
    """For each square, row by row, its features or, past the edge, None."""
    rows, columns, _ = view.shape
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            places = [(top + y, left + x) for y in range(side) for x in range(side)]
            yield [view[y, x] if y < rows and x < columns else None for y, x in places]


def plain_tokens(connector, module, view):
    """The tokens [n, h] of the features [rows, columns, d] of a view."""
    features = view.flatten(0, 1)
    if connector.name == "mlp":
        return torch.stack([mlp(module, z) for z in features])
    if connector.name == "linear":
        return torch.stack([module.linear.weight @ z + module.linear.bias for z in features])
    found = []
    if connector.name == "pixel_shuffle":
        for square in squares_of(view, connector.factor):
            parts = [torch.zeros(view.shape[2]) if z is None else z for z in square]
            found.append(mlp(module, normed(module.norm, torch.cat(parts))))
    if connector.name == "linear_shuffle":
        for square in squares_of(view, connector.factor):
            found.append(
                module.linear.weight @ torch.cat([torch.zeros(view.shape[2]) if z is None else z for z in square])
            )
    if connector.name == "merger":
        for square in squares_of(view, connector.factor):
            parts = [torch.zeros(view.shape[2]) if z is None else z for z in square]
            if connector.rms:
                norm = module.main.norm
                parts = [z / (z.pow(2).sum() / len(z) + norm.eps) ** 0.5 * norm.weight for z in parts]
            else:
                parts = [normed(module.main.norm, z) for z in parts]
            found.append(mlp(module.main, torch.cat(parts)))
    if connector.name == "average":
        for square in squares_of(view, connector.factor):
            there = [z for z in square if z is not None]
            found.append(mlp(module, sum(there) / len(there)))
    if connector.name == "attention":
        attention, size = module.attention, view.shape[2] // connector.heads
        Z = normed(module.features_norm, features)
        for query in module.queries:
            q = attention.q_proj.weight @ normed(attention.norm, query)
            mixed = []
            for head in range(connector.heads):
                part = slice(head * size, (head + 1) * size)
                keys = torch.stack([attention.k_proj.weight[part] @ z for z in Z])
                values = torch.stack([attention.v_proj.weight[part] @ z for z in Z])
                weights = torch.exp(keys @ q[part] / size**0.5)
                mixed.append(weights @ values / weights.sum())
            found.append(mlp(module, normed(module.norm, attention.o_proj.weight @ torch.cat(mixed))))
    return torch.stack(found)
