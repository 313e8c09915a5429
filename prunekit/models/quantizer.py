"""How transformers itself opens prunekit's checkpoints, through whatever class it is asked.

Beside the layers' description a checkpoint's config.json says `"quantization_config":
{"quant_method": "prunekit"}`. transformers then hands the model, empty on the meta device, to the
`HfQuantizer` registered here, which takes out what was dropped and makes packed layers of those
that are packed; the files' tensors go straight into them. Once they are in, the layers are checked
and brought to the type that was asked for, and the model is left as `swap_` leaves one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from prunekit.errors import PrunekitError
from prunekit.models import dropped
from prunekit.models.layouts import base_model_type, check_supported
from prunekit.models.packed_saving import save_packed_
from prunekit.packed.described import PACKED_FIELD, QUANT_METHOD, check_packed, install_skeletons_
from prunekit.packed.modules import PackedLinear


class DamagedWeightsError(PrunekitError):
    """The tensors that were read are no valid packed weights."""


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Says that a checkpoint is prunekit's; what it holds stands elsewhere in config.json."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(quant_method=QUANT_METHOD)


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Makes room for packed layers, and for nothing where sublayers were dropped."""

    requires_calibration = False

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.dtype: torch.dtype | None = None
        if not self.pre_quantized:
            raise PrunekitError(
                "a dense checkpoint can't be packed while it is loaded: load it, then "
                "prunekit.swap_(model)"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """See which type the model will have."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_supported(model.config)
        stock = dropped.stock_class(base_model_type(model.config))
        if not isinstance(model, stock):
            raise PrunekitError(
                f"this checkpoint is a {stock.__name__}, and not a {type(model).__name__}: load it "
                "with AutoModelForCausalLM"
            )
        if isinstance(model, dropped.model_class(base_model_type(model.config))):
            return  # it has made itself what its configuration says
        packed = getattr(model.config, PACKED_FIELD, None)
        lists = {
            sublayer: dropped.normalize_drop_list(getattr(model.config, field, None))
            for sublayer, field in dropped.DROP_LISTS.items()
        }
        if any(lists.values()):
            for field in dropped.DROP_LISTS.values():
                vars(model.config).pop(field, None)
            dropped.drop_sublayers_(model, **lists)
        install_skeletons_(model, packed)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check the packed layers, convert them, and leave a model like a swapped one."""
        self.remove_quantization_config(model)
        try:
            check_packed(model)
        except PrunekitError as error:
            raise DamagedWeightsError(str(error)) from error
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLinear) and layer.dtype != self.dtype:
                if layer.weight.device.type == "meta":
                    raise PrunekitError(
                        f"{name} is offloaded, so its values can't be converted to {self.dtype}: "
                        "load the checkpoint in its own type"
                    )
                layer.to(self.dtype)
        vars(model.config).pop(PACKED_FIELD, None)
        lists = (getattr(model.config, field, None) for field in dropped.DROP_LISTS.values())
        if not any(lists):
            dropped.make_stock_(model)
        save_packed_(model)

    def is_serializable(self) -> bool:
        """Packed layers are written by `save_pretrained`, see `packed_saving`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The layers are custom ops with fakes."""
        return True
