"""Environments: one module per simulator, each with `make(env_id, num_envs, device, *, seed, ...)` and one contract.

Attributes   env_id, num_envs (N), device, action_dim (A), state_dim (S), privileged_dim (0 unless `asymmetric`),
             image_shape (H, W, 3 x cameras), max_episode_steps, control_hz, nan_resets, and `spec`: what a robot needs
             to run a policy, as plain values (joints, limits, control rate, action scale, cameras, layout of the state)
obs          dict: "rgb" uint8 (N, H, W, C), cameras stacked on channels; "state" float32 (N, S); with `asymmetric` also
             "privileged" float32 (N, P), for a critic and never for a policy. Everything lives on `device`
reset(seed)  -> obs. With a seed, always the same episodes; all clocks at 0
step(a)      actions (N, A) in [-1, 1] -> obs, rewards (N,), terminations (N,), truncations (N,), info
             A world whose episode ends begins the next one in the same step. info["final_obs"]: the true next
             observation of every world; info["success"] (N,): of that state; info["episode"]: return, length,
             success_once and success_at_end (N,), valid where an episode ended. Success never ends an episode.
             A world whose physics is no longer finite is restarted alone, truncated and counted in `nan_resets`
render(...)  pictures for people, uint8 (worlds, size, size, 3)
state_dict, load_state_dict, close
With `stagger=True` the constructor spreads the clocks, so that worlds do not reset in lockstep.
"""
