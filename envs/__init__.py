"""The tasks. Each module is one simulator and gives `make(env_id, num_envs, device, *, seed, ...)`.

Nothing is imported here, so that using one simulator never needs another. `python -m envs.check` tells which work.
"""
