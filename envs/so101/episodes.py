"""What differs between episodes: the ranges of the domain randomisation, and how a new episode is drawn and written."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from envs.so101.rotations import quat_mul
from envs.so101.tasks import (
    BIN_DENSITY,
    BIN_THICKNESS,
    DENSITY,
    FINGER_FRICTION,
    RANDOM_TRIES,
    SPAWN_CENTRE,
    SPAWN_GAP,
    SPAWN_HALF,
    TABLE_FRICTION,
)


@dataclass(frozen=True)
class Randomization:
    """Ranges of the domain randomisation, drawn uniformly per environment and episode unless a line says else.

    `Randomization().off()` collapses every range to its middle and every noise to zero; the spawn pose of the objects
    and the 0.02 rad of noise on the start pose belong to the task and stay.
    """

    cube_size: tuple[float, float] = (0.022, 0.028)
    """Edge of the cube, metres."""
    large_cube_size: tuple[float, float] = (0.025, 0.035)
    """Edge of the cube that is stacked upon, metres."""
    can_diameter: tuple[float, float] = (0.028, 0.038)
    """Diameter of the can, metres."""
    can_height: tuple[float, float] = (0.050, 0.070)
    """Height of the can, metres."""
    bin_length: tuple[float, float] = (0.090, 0.110)
    """Bin, between the centres of opposite walls along its y axis, metres."""
    bin_width: tuple[float, float] = (0.070, 0.090)
    """Bin, between the centres of opposite walls along its x axis, metres."""
    bin_wall: tuple[float, float] = (0.024, 0.036)
    """Height of the bin's walls, metres."""
    mass_factor: tuple[float, float] = (0.8, 1.2)
    """Factor on the objects' mass (density 200 kg/m^3, the bin's 1,000)."""
    friction: tuple[float, float] = (0.1, 0.5)
    """Sliding friction of the objects' own material; in a contact the mean with the other side's counts."""
    gripper_stiffness: tuple[float, float] = (0.5, 2.0)
    """Factor on the gripper servo's position gain (1 = nominal when off)."""
    gripper_damping: tuple[float, float] = (0.5, 2.0)
    """Factor on the gripper servo's velocity gain (1 = nominal when off)."""
    arm_stiffness: tuple[float, float] = (0.9, 1.1)
    """Factor on the arm servos' position gains."""
    action_delay: tuple[float, float] = (0.0, 0.03)
    """Seconds before a new target reaches the servos, in steps of the simulation (10 ms)."""
    joint_noise: float = math.radians(5.0)
    """Standard deviation of the noise on the joint readings that the policy sees, radians, at every step."""
    ambient: tuple[float, float] = (0.2, 0.5)
    """Ambient light, per colour channel."""
    diffuse: tuple[float, float] = (0.4, 0.6)
    """Strength of each of the two directional lights."""
    light_tilt: float = 0.2
    """Largest change of each component of a light's direction."""
    colour: float = 0.08
    """Largest change of each colour channel of objects, plastic and servos."""
    camera_position: float = 0.002
    """Largest shift of the wrist camera along each axis, metres."""
    camera_rotation: float = math.radians(1.0)
    """Largest rotation of the wrist camera about each axis, radians."""
    camera_fovy: float = 1.0
    """Largest change of the wrist camera's vertical field of view, degrees."""
    third_position: float = 0.025
    """As `camera_position`, for the third-person camera."""
    third_rotation: float = math.radians(1.0)
    """As `camera_rotation`, for the third-person camera."""
    third_fovy: float = 5.0
    """As `camera_fovy`, for the third-person camera."""

    def off(self) -> "Randomization":
        """The same object with every range at its middle (factors 1, delay 0) and every noise 0."""
        fixed = {"gripper_stiffness": 1.0, "gripper_damping": 1.0, "action_delay": 0.0}
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            middle = fixed.get(field.name, sum(value) / 2) if isinstance(value, tuple) else None
            values[field.name] = 0.0 if middle is None else (middle, middle)
        return Randomization(**values)


def _uniform(generator, n: int, low_high, *shape) -> torch.Tensor:
    low, high = low_high
    return low + (high - low) * torch.rand(n, *shape, generator=generator, device=generator.device)


def begin(env, idx: torch.Tensor, numbers: list[int]) -> None:
    """Draws and writes a new episode for the environments `idx` (M,) (`numbers`: the same on the host)."""
    m = len(numbers)
    rand = lambda bounds, *shape: _uniform(env.generator, m, bounds, *shape)  # noqa: E731
    sym = lambda width, *shape: _uniform(env.generator, m, (-width, width), *shape)  # noqa: E731
    fields = {name: value.expand(m, *value.shape).clone() for name, value in env.nominal.items()}
    heights = _draw_objects(env, fields, idx, rand)
    _draw_servos(env, fields, idx, rand)
    _draw_lights_and_colours(env, fields, rand, sym)
    _draw_cameras(env, fields, sym)
    for name, value in fields.items():
        env.fields[name][idx] = value
    env.physics.write_models(numbers)

    qpos = _draw_poses(env, m, heights)
    qvel = torch.zeros(m, env.mjm.nv, device=env.device)
    env.physics.set_state(idx, qpos, qvel)
    env.qpos[idx], env.qvel[idx], env.contact[idx] = qpos, qvel, 0.0
    env.target[idx] = env.old_target[idx] = qpos[:, :6]
    env.first_qpos[idx] = qpos
    env.returns[idx], env.success_once[idx] = 0.0, False


def _draw_objects(env, fields: dict, idx: torch.Tensor, rand) -> dict[str, torch.Tensor]:
    """Sizes, masses, friction -> heights (M,) of the frames of item and support over their undersides."""
    dr, m = env.dr, len(idx)
    friction, factor = rand(dr.friction), rand(dr.mass_factor)
    half = {"cube": rand(dr.cube_size, 1).expand(m, 3) / 2}
    radius, height = rand(dr.can_diameter) / 2, rand(dr.can_height) / 2
    half["can"] = torch.stack((radius, radius, height), 1)
    half["large_cube"] = rand(dr.large_cube_size, 1).expand(m, 3) / 2
    half["bin"] = torch.stack(
        (rand(dr.bin_width) / 2, rand(dr.bin_length) / 2, rand(dr.bin_wall)), 1
    )
    item = half[env.task.item]
    mass, item_z = _write_object(env, fields, "item", env.task.item, item, factor, friction)
    env.item_half[idx] = item
    heights = {"item": item_z}
    if env.task.support:
        below = half[env.task.support]
        _, heights["support"] = _write_object(
            env, fields, "support", env.task.support, below, factor, friction
        )
        env.support_half[idx], env.support_z[idx] = below, heights["support"]
    env.friction[idx], env.mass[idx] = friction, mass
    for name in ("fixed_finger", "moving_finger"):
        fields["geom_friction"][:, env.mjm.geom(name).id, 0] = (FINGER_FRICTION + friction) / 2
    return heights


def _draw_servos(env, fields: dict, idx: torch.Tensor, rand) -> None:
    """Gains of the servos, and the delay before they hear of a new target."""
    dr = env.dr
    gain = torch.cat((rand(dr.arm_stiffness, 5), rand(dr.gripper_stiffness, 1)), 1)
    fields["actuator_gainprm"][:, :, 0] *= gain
    fields["actuator_biasprm"][:, :, 1] *= gain
    fields["actuator_biasprm"][:, 5, 2] *= rand(dr.gripper_damping)
    env.delay[idx] = (rand(dr.action_delay) / env.mjm.opt.timestep).round().int()


def _draw_lights_and_colours(env, fields: dict, rand, sym) -> None:
    """Two lights; colours of plastic, servos and objects."""
    dr = env.dr
    fields["light_ambient"][:, 0] = rand(dr.ambient, 3)
    fields["light_diffuse"][:] = rand(dr.diffuse, 2, 1)
    tilted = fields["light_dir"] + sym(dr.light_tilt, 2, 3)
    fields["light_dir"][:] = tilted / tilted.norm(dim=-1, keepdim=True)
    robot, item, support = sym(dr.colour, 2, 3), sym(dr.colour, 3), sym(dr.colour, 3)
    rgba, nominal = fields["geom_rgba"], env.nominal["geom_rgba"]
    rgba[..., :3] += torch.where(rgba[..., :1] < 0.5, robot[:, :1], robot[:, 1:])
    of_item = env.mjm.geom("item").id
    rgba[:, of_item, :3] = nominal[of_item, :3] + item
    if env.task.support:
        of_support = [g for g in range(env.mjm.ngeom) if env.mjm.geom(g).name.startswith("support")]
        rgba[:, of_support, :3] = nominal[of_support, :3] + support[:, None]
    rgba.clamp_(0.0, 1.0)


def _draw_cameras(env, fields: dict, sym) -> None:
    """Places, directions and fields of view of the cameras."""
    dr = env.dr
    for name, shift, turn, fovy in (
        ("wrist", dr.camera_position, dr.camera_rotation, dr.camera_fovy),
        ("third", dr.third_position, dr.third_rotation, dr.third_fovy),
    ):
        cam = env.mjm.camera(name).id
        fields["cam_pos"][:, cam] += sym(shift, 3)
        angles = sym(turn, 3)
        small = torch.cat((torch.ones_like(angles[:, :1]), angles / 2), 1)
        fields["cam_quat"][:, cam] = quat_mul(
            fields["cam_quat"][:, cam], small / small.norm(dim=1, keepdim=True)
        )
        fields["cam_fovy"][:, cam] += sym(fovy)


def _draw_poses(env, m: int, heights: dict) -> torch.Tensor:
    """qpos (M, nq): arm near its start pose, item anywhere in the region, support where it is clear of that."""
    dev, gen = env.device, env.generator
    qpos = torch.zeros(m, env.mjm.nq, device=dev)
    qpos[:, :6] = env.start_pose + 0.02 * torch.randn(m, 6, generator=gen, device=dev)
    qpos[:, :6] = torch.clamp(qpos[:, :6], env.joint_low, env.joint_high)
    centre = torch.tensor(SPAWN_CENTRE, device=dev)
    places = centre + _uniform(gen, m, (-SPAWN_HALF, SPAWN_HALF), RANDOM_TRIES, 2)
    yaws = _uniform(gen, m, (-math.pi, math.pi), 2)
    item_xy = centre + _uniform(gen, m, (-SPAWN_HALF, SPAWN_HALF), 2)
    if env.task.support:
        apart = spawn_radius(env.dr, env.task.item) + spawn_radius(env.dr, env.task.support)
        gap = (places - item_xy[:, None]).norm(dim=-1) - apart
        # The first of the tries that is clear; if none is, the farthest.
        first = torch.where(
            gap >= 0, torch.arange(RANDOM_TRIES, 0, -1, device=dev), gap.clamp(-0.9, 0)
        ).argmax(1)
        support_xy = places.gather(1, first[:, None, None].expand(m, 1, 2)).squeeze(1)
        _write_pose(qpos, env._q["support"], support_xy, heights["support"], yaws[:, 1])
    _write_pose(qpos, env._q["item"], item_xy, heights["item"], yaws[:, 0])
    return qpos


def spawn_radius(dr: Randomization, shape: str) -> float:
    """Radius in metres around an object of the largest size in which no other spawns, as published: half an edge of
    a cube, the radius of a can, half the diagonal of a bin, and 1 cm."""
    largest = {
        "cube": dr.cube_size[1] / 2,
        "large_cube": dr.large_cube_size[1] / 2,
        "can": dr.can_diameter[1] / 2,
        "bin": math.hypot(dr.bin_width[1], dr.bin_length[1]) / 2,
    }
    return largest[shape] + SPAWN_GAP


def _write_pose(qpos: torch.Tensor, adr: int, xy, z, yaw) -> None:
    """Place and turn about the vertical of the free joint at `adr`."""
    qpos[:, adr : adr + 2], qpos[:, adr + 2] = xy, z
    qpos[:, adr + 3], qpos[:, adr + 6] = torch.cos(yaw / 2), torch.sin(yaw / 2)


def _write_object(env, f, name, shape, half, factor, friction):
    """Writes sizes (M, 3), mass and friction of an object into the field rows `f`.

    Returns its mass (M,) in kg and the height (M,) of its frame over its underside in metres.

    Every object's frame sits at its centre of mass (a bin is five uniform plates).
    """
    body, dof = env.mjm.body(name).id, env._v[name]
    if shape == "bin":
        x, y, h = half.unbind(1)
        t = torch.full_like(x, BIN_THICKNESS / 2)
        sizes = torch.stack((
            torch.stack((x + t, y + t, t), 1), torch.stack((t, y + t, h / 2), 1), torch.stack((t, y + t, h / 2), 1),
            torch.stack((x + t, t, h / 2), 1), torch.stack((x + t, t, h / 2), 1),
        ), 1)  # fmt: skip
        o = torch.zeros_like(x)
        places = torch.stack((
            torch.stack((o, o, t), 1), torch.stack((x, o, h / 2), 1), torch.stack((-x, o, h / 2), 1),
            torch.stack((o, y, h / 2), 1), torch.stack((o, -y, h / 2), 1),
        ), 1)  # fmt: skip
        geoms = [env.mjm.geom(name + part).id for part in ("floor", "x+", "x-", "y+", "y-")]
    else:
        sizes, geoms = half[:, None], [env.mjm.geom(name).id]
        places = torch.zeros_like(sizes)
    extents = sizes
    if shape == "can":  # MuJoCo's cylinder: size = (radius, half height, unused)
        sizes = torch.stack((half[:, 0], half[:, 2], torch.zeros_like(half[:, 0])), 1)[:, None]
    volume = (math.pi * 2 if shape == "can" else 8) * extents.prod(-1)  # cylinder: pi r^2 * 2 (h/2)
    masses = (BIN_DENSITY if shape == "bin" else DENSITY) * volume * factor[:, None]
    square = extents**2
    if shape == "can":
        radial = (3 * square[..., 0] + 4 * square[..., 2]) / 12
        own = torch.stack((radial, radial, square[..., 0] / 2), -1)
    else:
        own = (square.sum(-1, keepdim=True) - square) / 3
    mass = masses.sum(1)
    com = (masses[..., None] * places).sum(1, keepdim=True) / mass[:, None, None]
    places = places - com
    inertia = (masses[..., None] * (own + (places**2).sum(-1, keepdim=True) - places**2)).sum(1)
    f["geom_size"][:, geoms], f["geom_pos"][:, geoms] = sizes, places
    f["geom_rbound"][:, geoms] = torch.where(
        torch.tensor(shape == "can", device=env.device),
        sizes[..., :2].norm(dim=-1),
        sizes.norm(dim=-1),
    )
    f["geom_aabb"][:, geoms] = torch.stack((torch.zeros_like(extents), extents), 2)
    if shape != "bin":  # a contact has the mean of both sides' friction; table and bin have 0.3
        f["geom_friction"][:, geoms, 0] = (friction[:, None] + TABLE_FRICTION) / 2
    f["body_mass"][:, body] = f["body_subtreemass"][:, body] = mass
    f["body_inertia"][:, body] = inertia
    turning = (1 / inertia).mean(1)
    f["body_invweight0"][:, body, 0], f["body_invweight0"][:, body, 1] = 1 / mass, turning
    f["dof_invweight0"][:, dof : dof + 3] = 1 / mass[:, None]
    f["dof_invweight0"][:, dof + 3 : dof + 6] = turning[:, None]
    f["dof_M0"][:, dof : dof + 6] = torch.cat((mass[:, None].expand(-1, 3), inertia), 1)
    return mass, com[:, 0, 2] if shape == "bin" else half[:, 2]
