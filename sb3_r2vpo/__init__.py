"""
R2VPO: policy optimization with a trust region on the variance of the probability ratio, for Stable-Baselines3.

Names are imported on first use: ``sb3_r2vpo.core``, the mathematics, needs nothing but PyTorch.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_r2vpo.common.allowed import allow
    from sb3_r2vpo.maskable import MaskableR2VPO, MaskableR2VPOOff
    from sb3_r2vpo.r2vpo import R2VPO
    from sb3_r2vpo.r2vpo_off import R2VPOOff
    from sb3_r2vpo.recurrent import MaskableRecurrentR2VPO, RecurrentR2VPO

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = [
    "R2VPO",
    "MaskableR2VPO",
    "MaskableR2VPOOff",
    "MaskableRecurrentR2VPO",
    "R2VPOOff",
    "RecurrentR2VPO",
    "__version__",
    "allow",
]

_MODULES = {
    "allow": "sb3_r2vpo.common.allowed",
    "R2VPO": "sb3_r2vpo.r2vpo",
    "R2VPOOff": "sb3_r2vpo.r2vpo_off",
    "MaskableR2VPO": "sb3_r2vpo.maskable",
    "MaskableR2VPOOff": "sb3_r2vpo.maskable",
    "MaskableRecurrentR2VPO": "sb3_r2vpo.recurrent",
    "RecurrentR2VPO": "sb3_r2vpo.recurrent",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def _register_environments() -> None:
    """Register dm_control/<domain>-<task>-v0 with Gymnasium."""
    module = import_module("sb3_r2vpo.envs.dm_control")
    # Not there yet where it is that module which imports Gymnasium; its package registers them in the end
    if hasattr(module, "register"):
        module.register()


class _AfterGymnasium(MetaPathFinder):
    """Registers the environments once Gymnasium is imported, so that importing ``sb3_r2vpo.core`` does not import it."""

    searching = False

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "gymnasium" or self.searching:
            return None
        self.searching = True
        spec = find_spec(name)
        self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register_environments()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "gymnasium" in sys.modules:
    _register_environments()
else:
    sys.meta_path.insert(0, _AfterGymnasium())
