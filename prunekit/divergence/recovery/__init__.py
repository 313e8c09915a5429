"""Fine-tune a pruned or dropped model back towards the dense one, its zeros held."""

from prunekit.divergence.recovery.callback import KeepMasks
from prunekit.divergence.recovery.recover import recover_
from prunekit.divergence.recovery.settings import RecoverReport, Recovery

__all__ = ["KeepMasks", "RecoverReport", "Recovery", "recover_"]
