"""Load and save models: folders of safetensors, GGUF files, Hub models and the embedded one.

| what was dropped   | written as                               | loads in                         |
|--------------------|------------------------------------------|----------------------------------|
| nothing, or blocks | the stock architecture                   | transformers, vLLM, llama.cpp    |
| sublayers          | `prunekit_<base>`, their tensors absent  | transformers with prunekit       |
| sublayers, zeroed  | stock, their last projections zero       | everything, without the speed-up |
| packed layers      | `prunekit_<base>`, packed tensors        | transformers with prunekit       |

Other pruned weights are written as dense zeros. Beside the model stands `prunekit.json` (see
`manifest.py`), whose checksums loading verifies. Only safetensors are read, never pickles, and code
that a checkpoint carries is never run.
"""

from prunekit.checkpoint.integrity import check_finite
from prunekit.checkpoint.reading import load
from prunekit.checkpoint.writing import SAVE_FORMATS, check_format, save

__all__ = ["SAVE_FORMATS", "check_finite", "check_format", "load", "save"]
