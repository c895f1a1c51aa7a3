"""From a trained policy to a real robot: buses, cameras, calibration and limits.

Nothing here imports a simulator: the robot's computer needs a checkpoint and `algos/` only.
"""
