"""The layouts: parts add up to the stock layer, and every matrix is found."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunekit.errors import PrunekitError
from prunekit.models import blocks, layouts, weight_refs
from prunekit.models.architectures import Architecture


@torch.inference_mode()
def test_layer_by_layer_equals_the_stock_forward(architecture, tiny, token_ids):
    arch = Architecture(tiny(architecture))
    expected = arch.base(input_ids=token_ids, use_cache=False).last_hidden_state
    inputs = blocks.capture(arch, token_ids)
    by_layer = by_sublayer = inputs.hidden
    for index, kwargs in enumerate(inputs.kwargs):
        by_layer = blocks.run_layer(arch, index, by_layer, kwargs)
        by_sublayer = blocks.trace_layer(arch, index, by_sublayer, kwargs).output
    torch.testing.assert_close(arch.final_norm(by_layer), expected, rtol=0, atol=0)
    torch.testing.assert_close(arch.final_norm(by_sublayer), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_capture_restores_forwards_and_needs_no_mask_for_right_padding(
    architecture, tiny, token_ids
):
    model = tiny(architecture)
    arch = Architecture(model)
    before = model(token_ids[:1, :4]).logits
    inputs = blocks.capture(arch, token_ids)
    assert all("forward" not in layer.__dict__ for layer in arch.layers)
    hidden = inputs.hidden
    for index, kwargs in enumerate(inputs.kwargs):
        hidden = blocks.run_layer(arch, index, hidden, kwargs)
    logits = arch.head.logits(arch.final_norm(hidden))
    torch.testing.assert_close(logits[:1, :4], before, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_layers_accelerate_hook_works_around_its_sublayers(tiny, token_ids):
    """Weights that only the layer's own hook brings in are there for each sublayer too."""
    arch = Architecture(tiny("llama"))
    inputs = blocks.capture(arch, token_ids)
    expected = blocks.trace_layer(arch, 1, inputs.hidden, inputs.kwargs[1])
    layer = arch.layers[1]
    weights = {name: value.clone() for name, value in layer.state_dict().items()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
    add_hook_to_module(layer, hook)
    assert layer.self_attn.q_proj.weight.is_meta
    found = blocks.trace_layer(arch, 1, inputs.hidden, inputs.kwargs[1])
    for name in ("attn_out", "mlp_residual", "mlp_out", "output"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert layer.self_attn.q_proj.weight.is_meta  # and gone again


@pytest.mark.parametrize("dropped", [None, "attn", "mlp"])
@torch.inference_mode()
def test_a_layer_on_another_device_takes_its_inputs_there(tiny, token_ids, dropped):
    arch = Architecture(tiny("llama"))
    inputs = blocks.capture(arch, token_ids)
    if dropped:
        arch.remove_(1, dropped)
    arch.layers[1].to("meta")  # stands for a second GPU: adding across devices raises
    add_hook_to_module(arch.layers[1], AlignDevicesHook("meta"))
    found = blocks.trace_layer(arch, 1, inputs.hidden, inputs.kwargs[1])
    assert found.output.is_meta and found.output.shape == inputs.hidden.shape
    assert blocks.run_layer(arch, 1, inputs.hidden, inputs.kwargs[1]).is_meta


def test_every_matrix_of_the_layers_is_found_once(architecture, tiny):
    model = tiny(architecture)
    arch = Architecture(model)
    refs = [ref for index in range(len(arch.layers)) for ref in arch.weights(index)]
    assert len({ref.name for ref in refs}) == len(refs)
    found = sum(ref.matrix.numel() for ref in refs)
    expected = 0
    for module in arch.layers.modules():
        if isinstance(module, nn.Linear | Conv1D):
            expected += module.weight.numel()
        else:
            expected += sum(tensor.numel() for tensor in weight_refs.expert_tensors(module))
    assert found == expected > 0
    for ref in refs:
        assert model.get_submodule(ref.name.rsplit(".", 2)[0]) is not None


def test_matrix_is_out_by_in_and_writes_through(architecture, tiny):
    arch = Architecture(tiny(architecture))
    for ref in arch.weights(0):
        if ref.expert is None:
            x = torch.randn(3, ref.matrix.shape[1])
            bias = getattr(ref.module, "bias", None)
            y = x @ ref.matrix.t() + (0 if bias is None else bias)
            torch.testing.assert_close(ref.module(x), y, rtol=1e-4, atol=1e-5)
        ref.matrix.zero_()
        stored = getattr(ref.module, ref.parameter)
        stored = stored if ref.expert is None else stored[ref.expert]
        assert stored.count_nonzero() == 0


def test_shared_inputs_are_grouped(tiny):
    groups: dict[str, list[str]] = {}
    for ref in Architecture(tiny("llama")).weights(2):
        groups.setdefault(ref.input_group, []).append(ref.name.rsplit(".", 1)[-1])
    assert sorted(map(sorted, groups.values())) == [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
    ]


@torch.inference_mode()
def test_head_gives_the_models_logits(architecture, tiny, token_ids):
    model = tiny(architecture)
    arch = Architecture(model)
    hidden = arch.base(input_ids=token_ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(arch.head.logits(hidden), model(token_ids).logits)


@torch.inference_mode()
def test_silenced_sublayer_contributes_nothing(architecture, tiny, token_ids):
    arch = Architecture(tiny(architecture))
    inputs = blocks.capture(arch, token_ids)
    for sublayer in layouts.SUBLAYERS:
        for index in (0, 1):
            args = (index, sublayer, inputs.hidden, inputs.kwargs[index])
            assert arch.contribution(*args).abs().max() > 0
            for parameter in arch.last_projection(index, sublayer):
                parameter.zero_()
            assert arch.contribution(*args).abs().max() == 0


def matrix_names() -> set[str]:
    """Names of modules, matrices and parameters that only an architecture's row may hold."""
    names: set[str] = set()
    for layout in layouts.LAYOUTS.values():
        names.update(layout.projections)
        for parts in (layout.gated_mlp, layout.experts):
            names.update(dataclasses.astuple(parts) if parts else ())
        for branch in (layout.attn, layout.mlp):
            names.update((branch.norm, branch.post_norm or branch.norm))
            names.update(path.rpartition(".")[2] for path in branch.writes)
    return names - {"dense"}  # a dense layer, in other places


def test_only_the_layouts_name_a_module_or_matrix():
    package = Path(layouts.__file__).parents[1]
    # the second maps the names of GGUF files to those of Llama
    others = {Path(layouts.__file__), package / "checkpoint" / "gguf_reader.py"}
    names = matrix_names()
    assert {"q_proj", "gate_up_proj", "dense_4h_to_h", "act_fn", "ln_1"} <= names
    for path in set(package.rglob("*.py")) - others:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = node.value.rpartition(".")[2]
            assert named not in names, f"{path}:{node.lineno} names {named}"


def test_unknown_architecture_lists_what_is_missing():
    from transformers import AutoConfig

    with pytest.raises(
        PrunekitError, match=r"'bert' is not supported: prunekit lacks its layout.*llama"
    ):
        layouts.check_supported(AutoConfig.for_model("bert"))


def test_post_norm_opt_is_refused(tiny):
    with pytest.raises(PrunekitError, match="post-norm"):
        Architecture(tiny("opt", do_layer_norm_before=False))
