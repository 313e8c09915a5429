"""Pruning tiny models in tests: the methods, a model's matrices, and what enters them."""

from __future__ import annotations

import torch

from prunekit.models.architectures import Architecture
from prunekit.pruning import (
    ADMM,
    RIA,
    Magnitude,
    SparseGPT,
    Wanda,
    prune_,
    sparsegpt,
)

METHODS = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "variant": lambda **settings: Wanda(variant=True, **settings),
    "ria": RIA,
    "admm": ADMM,
    # a block that divides no matrix of the tiny models
    "sparsegpt": lambda **settings: SparseGPT(block=20, **settings),
}


def refs_of(model):
    arch = Architecture(model)
    return [ref for index in range(len(arch.layers)) for ref in arch.weights(index)]


def prune(model, recipe, tokens=None, **settings):
    return prune_(model, recipe, tokens, progress=False, **settings)


def correlated_inputs(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    scale = torch.rand(width, generator=generator) + 0.1
    return torch.randn(tokens, width, generator=generator) @ (torch.eye(width) + 2 * mixing) * scale


def hessian_of(inputs):
    hessian = torch.zeros(inputs.shape[1], inputs.shape[1])
    sparsegpt.accumulate_(hessian, inputs)
    sparsegpt.mirror_(hessian)
    return hessian


def inputs_of(model, tokens):
    """{matrix name: (tokens, in) its input} when the whole model runs."""
    found = {}

    def hook(name):
        return lambda module, args: found.__setitem__(name, args[0].detach().flatten(0, -2))

    handles = [
        ref.module.register_forward_pre_hook(hook(ref.name))
        for ref in refs_of(model)
        if ref.expert is None
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found
