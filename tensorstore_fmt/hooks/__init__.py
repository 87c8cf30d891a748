"""Hooks: what saves tensors of a training program by itself.

`tensorstore_fmt.hooks.torch` attaches to PyTorch modules. What is saved is chosen by `Collection`,
when by `SaveConfig`, and in what form by `Reductions`; these three know no framework.
"""

from tensorstore_fmt.hooks.collections import Collection
from tensorstore_fmt.hooks.reductions import Reduction, Reductions
from tensorstore_fmt.hooks.schedule import SaveConfig

__all__ = ["Collection", "Reduction", "Reductions", "SaveConfig"]
