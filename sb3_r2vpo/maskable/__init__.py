from sb3_contrib.ppo_mask import CnnPolicy, MlpPolicy, MultiInputPolicy

from sb3_r2vpo.maskable.maskable import MaskableR2VPO, MaskableR2VPOOff

__all__ = ["CnnPolicy", "MaskableR2VPO", "MaskableR2VPOOff", "MlpPolicy", "MultiInputPolicy"]
