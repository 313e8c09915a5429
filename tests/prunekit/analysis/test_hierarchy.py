"""Layerwise and accumulated analysis against plain float64 formulas and hand computation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model

from prunekit.analysis.decoding import teacher_forced
from prunekit.analysis.hierarchy import accumulated, layerwise
from prunekit.analysis.spaces import METRICS
from prunekit.errors import PrunekitError
from prunekit.models import generation
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.models.generation import Rollout
from prunekit.models.layouts import SUBLAYERS

ZERO = (
    "h_one_minus_cosine",
    "h_one_minus_cosine_estimate",
    "h_alpha",
    "h_parallel_ratio",
    "h_orthogonal_ratio",
    "z_one_minus_cosine",
    "z_alpha",
    "z_parallel_ratio",
    "z_orthogonal_ratio",
    "p_one_minus_cosine",
    "p_one_minus_cosine_estimate",
    "kl_dense_pruned",
    "kl_pruned_dense",
    "kl_estimate",
    "uniform_variance",
    "z_delta_rms",
    "flipped",
)
ONE = ("h_cosine", "z_cosine", "p_cosine", "estimate_valid")


def assert_identical(grid):
    """Every divergence exactly 0 and every cosine exactly 1, wherever there is a step."""
    there = ~np.isnan(grid["entropy_dense"])
    assert there.any()
    for name in (*ZERO, *ONE):
        np.testing.assert_array_equal(grid[name][there], float(name in ONE), err_msg=name)
    np.testing.assert_array_equal(grid["entropy_dense"], grid["entropy_pruned"])
    np.testing.assert_array_equal(grid["nll_dense"], grid["nll_pruned"])


def rollouts(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def tokens(count):
        return tuple(torch.randint(3, 97, (count,), generator=draw).tolist())

    return [Rollout(tokens(prompt), tokens(new)) for prompt, new in lengths]


def plain(a, b, temperature=1.0, weights=None):
    """Metrics of two rows of float64 logits by the textbook formulas."""
    p, q = torch.softmax(a / temperature, -1), torch.softmax(b / temperature, -1)
    w = p if weights is None else weights
    d, r = b - a, w**2 / (w**2).sum()
    alpha = (d @ a / (a @ a)).item()

    def variance(weight):
        return ((weight * (d - (weight * d).sum()) ** 2).sum() / (2 * temperature**2)).item()

    return {
        "kl_dense_pruned": (p * (p / q).log()).sum().item(),
        "kl_pruned_dense": (q * (q / p).log()).sum().item(),
        "kl_estimate": variance(w),
        "p_cosine": torch.cosine_similarity(p, q, dim=-1).item(),
        "p_one_minus_cosine": 1 - torch.cosine_similarity(p, q, dim=-1).item(),
        "p_one_minus_cosine_estimate": variance(r),
        "uniform_variance": d.var(correction=0).item(),
        "z_delta_rms": d.square().mean().sqrt().item(),
        "z_cosine": torch.cosine_similarity(a, b, dim=-1).item(),
        "z_one_minus_cosine": 1 - torch.cosine_similarity(a, b, dim=-1).item(),
        "z_alpha": alpha,
        "z_parallel_ratio": abs(alpha),
        "z_orthogonal_ratio": ((d - alpha * a).norm() / a.norm()).item(),
        "entropy_dense": -(p * p.log()).sum().item(),
        "entropy_pruned": -(q * q.log()).sum().item(),
        "flipped": float(a.argmax() != b.argmax()),
        "margin_dense": (a.topk(2).values[0] - a.topk(2).values[1]).item(),
    }


def plain_hidden(h, g):
    d = g - h
    alpha = (d @ h / (h @ h)).item()
    orthogonal = ((d - alpha * h).norm() / h.norm()).item()
    return {
        "h_cosine": torch.cosine_similarity(h, g, dim=-1).item(),
        "h_one_minus_cosine": 1 - torch.cosine_similarity(h, g, dim=-1).item(),
        "h_one_minus_cosine_estimate": orthogonal**2 / 2,
        "h_alpha": alpha,
        "h_parallel_ratio": abs(alpha),
        "h_orthogonal_ratio": orthogonal,
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_identical_models_differ_nowhere(architecture, tiny, batch_size):
    model = tiny(architecture)
    twin = copy.deepcopy(model)
    sequences = rollouts((5, 7), (9, 4), (3, 9))
    for grid in (
        layerwise(model, twin, sequences, batch_size=batch_size),
        accumulated(model, twin, sequences, batch_size=batch_size),
        layerwise(model, twin, sequences, batch_size=batch_size, lens="raw", temperature=0.5),
    ):
        assert set(grid.metrics) == set(METRICS)
        steps = (~np.isnan(grid["h_cosine"])).reshape(3, 9, -1)
        np.testing.assert_array_equal(steps.all(-1).sum(1), [7, 4, 9])
        assert_identical(grid)


def test_half_precision_models(tiny, perturbed):
    model = tiny("gemma3_text").bfloat16()
    sequences = rollouts((5, 7), (9, 4))
    assert_identical(layerwise(model, copy.deepcopy(model), sequences))
    assert_identical(accumulated(model, copy.deepcopy(model), sequences))
    grid = layerwise(model, perturbed(model), sequences)
    there = ~np.isnan(grid["h_cosine"])
    assert (grid["kl_dense_pruned"][there] > 0).all()


@torch.no_grad()
def test_layerwise_equals_the_decode_loop_by_hand(architecture, tiny, perturbed):
    """Every step on its own prefix, inputs caught by hooks, float64 formulas."""
    model = tiny(architecture)
    pruned = perturbed(model)
    (rollout,) = rollouts((5, 4))
    grid = layerwise(model, pruned, [rollout], temperature=0.7)
    ours, theirs = Architecture(model), Architecture(pruned)
    for step in range(4):
        prefix = torch.tensor([rollout.ids[: 5 + step]])
        calls = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, a, k, calls=calls, index=index: calls.update({index: (a, k)}),
                with_kwargs=True,
            )
            for index, layer in enumerate(ours.layers)
        ]
        model(prefix, use_cache=False)
        for hook in hooks:
            hook.remove()
        for index, (args, kwargs) in calls.items():
            x = args[0] if args else kwargs["hidden_states"]
            kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            attn = ours.contribution(index, "attn", x, kwargs)
            read = x if ours.parallel else x + attn
            for place, (sublayer, enters, residual) in enumerate(
                (("attn", x, x), ("mlp", read, x + attn))
            ):
                states = [
                    (residual + arch.contribution(index, sublayer, enters, kwargs))[0, -1]
                    for arch in (ours, theirs)
                ]
                logits = [ours.head.logits(ours.final_norm(state)).double() for state in states]
                expected = plain(*logits, temperature=0.7)
                expected |= plain_hidden(*(state.double() for state in states))
                actual = rollout.continuation[step]
                expected["nll_dense"] = -(logits[0] / 0.7).log_softmax(-1)[actual].item()
                for name, value in expected.items():
                    found = grid[name][0, step, index, place]
                    assert found == pytest.approx(value, rel=2e-4, abs=2e-6), (name, index, step)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_raw_lens_reproduces_the_research_definitions(tiny, temperature, perturbed):
    """Their pruned mode: un-normed states, p the pruned distribution, KL(p ‖ q), weights p."""
    model = tiny("llama")
    pruned = perturbed(model, 0.02)
    (rollout,) = rollouts((6, 3))
    grid = layerwise(model, pruned, [rollout], lens="raw", weights="other", temperature=temperature)
    ids = torch.tensor([rollout.ids[:-1]])
    seen = {}

    def attn_hook(module, args, kwargs, output, index):
        read = kwargs["hidden_states"]
        theirs = pruned.model.layers[index].self_attn(**kwargs)[0]
        seen[index, "attn"] = (read, output[0], theirs)

    def mlp_hook(module, args, output, index):
        seen[index, "mlp"] = (args[0], output, pruned.model.layers[index].mlp(args[0]))

    residuals = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda m, a, k, o, i=index: attn_hook(m, a, k, o, i), with_kwargs=True
        )
        layer.mlp.register_forward_hook(lambda m, a, o, i=index: mlp_hook(m, a, o, i))
        layer.register_forward_pre_hook(lambda m, a, i=index: residuals.update({i: a[0]}))
    model(ids, use_cache=False)

    head = model.lm_head.weight.double()
    for index in range(len(model.model.layers)):
        residual = residuals[index]
        for place, sublayer in enumerate(SUBLAYERS):
            _, ours, theirs = seen[index, sublayer]
            full, cut = (residual + ours).double(), (residual + theirs).double()
            residual = residual + ours
            for step in range(3):
                h, h2 = full[0, 5 + step], cut[0, 5 + step]
                z, z2 = head @ h, head @ h2
                q, p = torch.softmax(z / temperature, -1), torch.softmax(z2 / temperature, -1)
                delta, r = z - z2, p**2 / (p**2).sum()

                def variance(weight, delta=delta):
                    return (weight * (delta - (weight * delta).sum()) ** 2).sum().item()

                expected = {
                    "kl_pruned_dense": (p * (p.log() - q.log())).sum().item(),  # REAL_KL
                    "kl_estimate": variance(p) / (2 * temperature**2),  # KL_estimate
                    "p_one_minus_cosine": (1 - torch.cosine_similarity(p, q, dim=-1)).item(),
                    "p_one_minus_cosine_estimate": variance(r) / (2 * temperature**2),
                    "uniform_variance": variance(torch.full_like(p, 1 / len(p))),
                    "z_one_minus_cosine": (1 - torch.cosine_similarity(z, z2, dim=-1)).item(),
                    "h_one_minus_cosine": (1 - torch.cosine_similarity(h, h2, dim=-1)).item(),
                }
                for space, (x, x2) in {"z": (z, z2), "h": (h, h2)}.items():
                    alpha = ((x2 - x) @ x) / (x @ x)
                    parallel = alpha * x
                    expected |= {
                        f"{space}_alpha": alpha.item(),
                        f"{space}_parallel_ratio": (parallel.norm() / x.norm()).item(),
                        f"{space}_orthogonal_ratio": ((x2 - x - parallel).norm() / x.norm()).item(),
                    }
                for name, value in expected.items():
                    found = grid[name][0, step, index, place]
                    assert found == pytest.approx(value, rel=1e-4), (name, index, sublayer, step)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
def test_results_do_not_depend_on_batching(tiny, name, perturbed):
    model = tiny(name)
    pruned = perturbed(model)
    # shorter ones are padded by more than Gemma's sliding window of 6
    sequences = rollouts((4, 6), (17, 9), (7, 8), (4, 6))
    for analyse in (layerwise, accumulated):
        together = analyse(model, pruned, sequences, batch_size=4)
        alone = analyse(model, pruned, sequences, batch_size=1)
        assert together.labels == alone.labels
        for metric in ("h_one_minus_cosine", "kl_dense_pruned", "z_alpha", "nll_pruned"):
            np.testing.assert_allclose(together[metric], alone[metric], rtol=1e-3, atol=1e-5)


def test_dropped_sublayer_leaves_the_residual(tiny):
    model = tiny("llama")
    pruned = copy.deepcopy(model)
    drop_sublayers_(pruned, attn=[2], mlp=[1])
    sequences = rollouts((5, 6), (8, 6))
    grid = layerwise(model, pruned, sequences)
    gone = np.zeros((4, 2), bool)
    gone[2, 0] = gone[1, 1] = True
    assert (grid["kl_dense_pruned"][:, :, gone] > 0).all()
    assert (grid["kl_dense_pruned"][:, :, ~gone] == 0).all()
    assert (grid["h_cosine"][:, :, ~gone] == 1).all()
    # Removing each sublayer of the dense model in turn agrees where the pruned one lacks it.
    removal = layerwise(model, None, sequences)
    for metric in METRICS:
        there, here = removal[metric][:, :, gone], grid[metric][:, :, gone]
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-7)
    assert (removal["kl_dense_pruned"] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_accumulated_ends_in_the_models_logits(tiny, name, perturbed):
    model = tiny(name)
    pruned = perturbed(model)
    drop_sublayers_(pruned, attn=[1])
    sequences = rollouts((5, 6), (7, 6))
    grid = accumulated(model, pruned, sequences)
    for prompt, rollout in enumerate(sequences):
        ids = torch.tensor([rollout.ids[:-1]])
        rows = [m(ids).logits[0, len(rollout.prompt) - 1 :].double() for m in (model, pruned)]
        for step, (a, b) in enumerate(zip(*rows, strict=True)):
            for metric, value in plain(a, b).items():
                found = grid[metric][prompt, step, -1]
                assert found == pytest.approx(value, rel=2e-4, abs=2e-6), (metric, step)


def test_dropped_blocks_keep_their_place(tiny):
    model = tiny("gemma2")
    pruned = copy.deepcopy(model)
    drop_blocks_(pruned, [1])
    sequences = rollouts((5, 4))
    grid = layerwise(model, pruned, sequences)
    assert grid.labels["layer"] == [0, 1, 2, 3]
    per_layer = (grid["kl_dense_pruned"] > 0).all((0, 1))
    np.testing.assert_array_equal(per_layer, [[False] * 2, [True] * 2, [False] * 2, [False] * 2])
    apart = accumulated(model, pruned, sequences)
    assert (apart["kl_dense_pruned"][:, :, 0] == 0).all()
    assert (apart["kl_dense_pruned"][:, :, 1:] > 0).all()


def test_positions_pick_steps(tiny, perturbed):
    model = tiny("qwen2")
    pruned = perturbed(model)
    sequences = rollouts((5, 6), (8, 3))
    every = layerwise(model, pruned, sequences)
    some = layerwise(model, pruned, sequences, positions=[4, 0])
    assert some.labels["step"] == [0, 4]
    np.testing.assert_array_equal(np.isnan(some["h_cosine"][:, 1, 0, 0]), [False, True])
    for name in ("kl_dense_pruned", "nll_dense"):
        np.testing.assert_allclose(some[name], every[name][:, [0, 4]], rtol=1e-4, atol=1e-7)
    with pytest.raises(PrunekitError, match="positions"):
        layerwise(model, pruned, sequences, positions=[40])


def test_chunks_of_states_give_the_same(tiny, monkeypatch, perturbed):
    from prunekit.analysis import hierarchy

    model = tiny("llama")
    pruned = perturbed(model)
    sequences = rollouts((5, 6), (8, 3))
    whole = layerwise(model, pruned, sequences)
    monkeypatch.setattr(hierarchy, "_STATE_BUDGET", 1)
    parts = layerwise(model, pruned, sequences)
    for name in METRICS:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 98}, r"vocabulary size \(97 and 98\)"),
        ({"hidden_size": 64}, r"hidden size \(32 and 64\)"),
        ({"num_hidden_layers": 3}, "does not say which it kept"),
    ],
    ids=str,
)
def test_mismatched_models_are_refused(tiny, changes, message):
    with pytest.raises(PrunekitError, match=message):
        layerwise(tiny("llama"), tiny("llama", **changes), rollouts((4, 2)))


def test_other_bad_input_is_refused(tiny):
    model, sequences = tiny("llama"), rollouts((4, 2))
    with pytest.raises(PrunekitError, match=r"architecture \(llama and qwen2\)"):
        layerwise(model, tiny("qwen2"), sequences)
    with pytest.raises(PrunekitError, match=r"attention implementation \(sdpa and eager\)"):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        accumulated(model, eager, sequences)
    with pytest.raises(PrunekitError, match="dtype"):
        layerwise(model, copy.deepcopy(model).bfloat16(), sequences)
    with pytest.raises(PrunekitError, match=r"training mode: call \.eval"):
        layerwise(model, copy.deepcopy(model).train(), sequences)
    with pytest.raises(PrunekitError, match=r"temperature 0.* must be above 0"):
        layerwise(model, model, sequences, temperature=0.0)
    with pytest.raises(PrunekitError, match="unknown lens 'normed'"):
        layerwise(model, model, sequences, lens="normed")
    with pytest.raises(PrunekitError, match="no prompt or no continuation"):
        layerwise(model, model, [Rollout((4, 5), ())])
    with pytest.raises(PrunekitError, match="the model's context is 64"):
        layerwise(model, model, rollouts((60, 9)))
    broken = copy.deepcopy(model)
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(PrunekitError, match="pruned model's logits are not finite"):
        layerwise(model, broken, sequences)


def test_offloaded_layers_give_the_same_numbers(tiny, perturbed, tmp_path):
    model = tiny("llama")
    pair, sequences = (model, perturbed(model)), rollouts((3, 4), (5, 2))
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    offloaded = []
    for name, whole in zip(("dense", "pruned"), pair, strict=True):
        layers = range(len(Architecture(whole).layers))
        where = {**places, **{f"model.layers.{at}": "disk" if at else "cpu" for at in layers}}
        options = {"main_device": "cpu", "offload_dir": tmp_path / name}
        offloaded.append(dispatch_model(copy.deepcopy(whole), where, **options))
    assert Architecture(offloaded[0]).layers[1].self_attn.q_proj.weight.is_meta
    for measure in (layerwise, accumulated, lambda *args: teacher_forced(*args)[0]):
        expected, found = measure(*pair, sequences), measure(*offloaded, sequences)
        for name in METRICS:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_an_offloaded_head_or_embedding_is_refused_by_name(tiny):
    model = tiny("llama")
    whole = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    for measure in (layerwise, accumulated):
        with pytest.raises(PrunekitError, match=r"head is offloaded.*device_map"):
            measure(whole, whole, rollouts((3, 4)))
    with pytest.raises(PrunekitError, match=r"embedding is offloaded.*device_map"):
        generation.generate(whole, [[5, 6]], max_new_tokens=2)
