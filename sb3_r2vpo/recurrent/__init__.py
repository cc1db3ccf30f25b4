from sb3_contrib.ppo_recurrent.policies import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy

from sb3_r2vpo.recurrent.maskable import (
    MaskableCnnLstmPolicy,
    MaskableMlpLstmPolicy,
    MaskableMultiInputLstmPolicy,
    MaskableRecurrentR2VPO,
)
from sb3_r2vpo.recurrent.recurrent import RecurrentR2VPO

__all__ = [
    "CnnLstmPolicy",
    "MaskableCnnLstmPolicy",
    "MaskableMlpLstmPolicy",
    "MaskableMultiInputLstmPolicy",
    "MaskableRecurrentR2VPO",
    "MlpLstmPolicy",
    "MultiInputLstmPolicy",
    "RecurrentR2VPO",
]
