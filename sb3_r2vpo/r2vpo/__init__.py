from sb3_r2vpo.common.policies import CensoredMlpPolicy, CnnPolicy, LayerNormMlpPolicy, MlpPolicy, MultiInputPolicy
from sb3_r2vpo.r2vpo.r2vpo import R2VPO

__all__ = ["R2VPO", "CensoredMlpPolicy", "CnnPolicy", "LayerNormMlpPolicy", "MlpPolicy", "MultiInputPolicy"]
