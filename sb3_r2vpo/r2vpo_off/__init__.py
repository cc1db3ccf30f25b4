from sb3_r2vpo.r2vpo_off.r2vpo_off import R2VPOOff

__all__ = ["R2VPOOff"]
