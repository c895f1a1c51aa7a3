"""What runs on a GPU equals what runs on the CPU: the arm's physics and images, DeepMind Control's images, gradients.

Each algorithm's own test compares its captured and compiled updates with the plain ones (-k cuda_graph).
"""

import pytest
import torch

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def arms(**options):
    """The same scene on the CPU and on the GPU, both with MuJoCo Warp."""
    so101 = pytest.importorskip("envs.so101", reason='needs MuJoCo Warp: pip install -e ".[so101]"')
    options = dict(engine="warp", seed=3, domain_randomization=False) | options
    return [so101.make("SO101LiftCube-v1", 8, device, **options) for device in ("cpu", GPU)]


def test_the_arm_moves_alike():
    host, device = arms(images=False)
    everything = torch.arange(8)
    device.physics.set_state(everything.to(GPU), host.qpos.to(GPU), host.qvel.to(GPU))
    generator, target = torch.Generator().manual_seed(1), host.target.clone()
    for _ in range(10):
        before, moves = target, torch.rand(8, 6, generator=generator) * 2 - 1
        target = (target + moves * host.action_scale).clamp(host.joint_low, host.joint_high)
        for env in (host, device):
            env.physics.step(before.to(env.device), target.to(env.device), env.delay)
    assert (host.qpos[:, :6] - device.qpos[:, :6].cpu()).abs().max() < 5e-3
    assert device.qpos.isfinite().all()


@pytest.mark.parametrize("size, rays", [(16, 4), (64, 1)])
def test_the_arm_is_drawn_alike(size, rays):
    host, device = arms(render_size=size, samples_per_pixel=rays)
    for env in (host, device):
        env.scene.qpos.copy_(host.qpos)
        env.scene.kinematics()
    images = [env.scene.draw().cpu().float() for env in (host, device)]
    assert images[0].std() > 10
    # a ray that grazes an edge may hit on one device and miss on the other
    assert (images[0] - images[1]).abs().mean() < 0.5


def test_deepmind_control_is_drawn_alike():
    dmc = pytest.importorskip("envs.dmc", reason='needs dm-control: pip install -e ".[so101,dmc]"')
    images = []
    for device in ("cpu", GPU):
        env = dmc.make("walker_walk", 3, device, seed=1, renderer="warp", workers=0, image_size=64)
        obs, *_ = env.step(torch.full((3, 6), 0.5, device=device))  # physics is MuJoCo's C library
        images.append(obs["rgb"].cpu().float())
        env.close()
    assert images[0].std() > 10
    assert (images[0] - images[1]).abs().mean() < 0.5


@pytest.mark.parametrize("env_id", ["AntRun", "RollingFlat", "HandFlip", "FluidMove"])
def test_gradients_agree(env_id):
    """Float64, from launches and from a captured graph; atomic sums come in another order."""
    rewarped = pytest.importorskip("envs.rewarped", reason='needs Warp: pip install -e ".[so101]"')
    from test_rewarped_gradients import gradient, scene

    saved, actions = scene(env_id)
    found = []
    for device, graph in (("cpu", False), (GPU, False), (GPU, True)):
        options = dict(size="small", dtype=torch.float64, seed=1, graph=graph)
        env = rewarped.make(env_id, 2, device, **options)
        state = {name: value.to(device) for name, value in saved["state"].items()}
        found.append(gradient(env, state, [action.to(device) for action in actions[:4]]).cpu())
    assert found[0].norm() > 0
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-6 * found[0].norm()
