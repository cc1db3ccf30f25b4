from sb3_r2vpo.r2vpo.policies import CensoredMlpPolicy, CnnPolicy, LayerNormMlpPolicy, MlpPolicy, MultiInputPolicy
from sb3_r2vpo.r2vpo.r2vpo import R2VPO
from sb3_r2vpo.r2vpo.r2vpo_off import R2VPOOff

__all__ = ["R2VPO", "CensoredMlpPolicy", "CnnPolicy", "LayerNormMlpPolicy", "MlpPolicy", "MultiInputPolicy", "R2VPOOff"]
