"""The MuJoCo model of a task: arm, table, cameras, objects, and the contact sensors that rewards read."""

import json
from pathlib import Path

import mujoco
import numpy as np

from envs.so101.tasks import BLUE, RED, SPAWN_CENTRE, TABLE_FRICTION, WHITE, Task

# Cameras of your arm: hardware/align_camera.py writes this file, if ever.
CAMERA_FILE = Path(__file__).parent.with_name("so101_cameras.json")


def _look_at(eye, target) -> np.ndarray:
    """Quaternion (w, x, y, z) of a MuJoCo camera (looks along -z, x to the right) at `eye` towards `target`."""
    back = np.asarray(eye, float) - np.asarray(target, float)
    back /= np.linalg.norm(back)
    right = np.cross((0.0, 0.0, 1.0), back)
    right /= np.linalg.norm(right)
    return _mat_to_quat(np.stack([right, np.cross(back, right), back], axis=1))


def _mat_to_quat(mat: np.ndarray) -> np.ndarray:
    quat = np.zeros(4)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(mat).ravel())
    return quat


def _wrist_camera() -> tuple[np.ndarray, np.ndarray]:
    """Position and quaternion of the wrist camera in the gripper's frame.

    Published as xyz and three angles (-90, 91, -35.31) degrees of a frame that looks along +x with z up. The order of
    the angles that makes the camera look down along the fingers, tilted 35 degrees towards them, is Ry Rz Rx.
    """
    roll, pitch, yaw = np.radians((-90.0, 91.0, -35.31))
    rx = np.array([[1, 0, 0], [0, np.cos(roll), -np.sin(roll)], [0, np.sin(roll), np.cos(roll)]])
    ry = np.array(
        [[np.cos(pitch), 0, np.sin(pitch)], [0, 1, 0], [-np.sin(pitch), 0, np.cos(pitch)]]
    )
    rz = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    forward, left, up = (ry @ rz @ rx).T
    return np.array((-0.0049, 0.0498, -0.0591)), _mat_to_quat(
        np.stack([-left, up, -forward], axis=1)
    )


def _add_upstream_meshes(spec: mujoco.MjSpec, asset_dir: str) -> None:
    """Replaces the drawn shapes of the arm by the meshes of a SO-ARM100 checkout; what collides stays ours.

    `asset_dir` is its `Simulation/SO101` folder: `so101_new_calib.xml` names the meshes and their places.
    """
    path = Path(asset_dir).expanduser() / "so101_new_calib.xml"
    if not path.is_file():
        raise FileNotFoundError(
            f"asset_dir: {path} does not exist; give SO-ARM100's folder Simulation/SO101"
        )
    upstream = mujoco.MjSpec.from_file(str(path))
    mesh_dir = path.parent / (upstream.meshdir or "")
    colours = {m.name: m.rgba for m in upstream.materials}
    for geom in list(spec.geoms):
        if geom.group == 2:
            geom.group = 5
    names = {"moving_jaw_so101_v1": "jaw"}
    for body in upstream.bodies:
        ours = spec.body(names.get(body.name, body.name))
        for geom in body.geoms:
            if (
                ours is None
                or geom.type != mujoco.mjtGeom.mjGEOM_MESH
                or geom.classname.name == "collision"
            ):
                continue
            if spec.mesh(geom.meshname) is None:
                file = upstream.mesh(geom.meshname).file
                spec.add_mesh(name=geom.meshname, file=str((mesh_dir / file).resolve()))
            ours.add_geom(
                type=mujoco.mjtGeom.mjGEOM_MESH, meshname=geom.meshname, pos=geom.pos, quat=geom.quat, group=2,
                contype=0, conaffinity=0, mass=0, rgba=colours.get(geom.material, geom.rgba),
            )  # fmt: skip


def build_model(task: Task, asset_dir: str | None = None) -> mujoco.MjModel:
    """Arm, table, cameras, the task's objects at their middle sizes, and the contact sensors that rewards read.

    Raises FileNotFoundError when `asset_dir` has no upstream model.
    """
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("so101.xml")))
    cameras = {camera.name: camera for camera in spec.cameras}
    cameras["wrist"].pos, cameras["wrist"].quat = _wrist_camera()
    for name, eye, target in (
        ("third", (0.6, 0.3, 0.3), (0.3, 0.0, 0.05)),
        ("person", (0.66, -0.46, 0.36), (0.2, 0.0, 0.08)),
    ):
        cameras[name].pos, cameras[name].quat = eye, _look_at(eye, target)
    for name, values in (
        json.loads(CAMERA_FILE.read_text()) if CAMERA_FILE.exists() else {}
    ).items():
        cameras[name].pos, cameras[name].quat = values["pos"], values["quat_wxyz"]
        cameras[name].fovy = values["fovy_degrees"]
    if asset_dir is not None:
        _add_upstream_meshes(spec, asset_dir)

    def add_object(name: str, shape: str, colour) -> None:
        body = spec.worldbody.add_body(name=name, pos=(*SPAWN_CENTRE, 0.1))
        body.add_freejoint(name=name)
        parts = {"bin": ("floor", "x+", "x-", "y+", "y-")}.get(shape, ("",))
        priority = (
            0 if shape == "bin" else 1
        )  # where item and bin touch, the item's friction counts
        for part in parts:
            kind = mujoco.mjtGeom.mjGEOM_CYLINDER if shape == "can" else mujoco.mjtGeom.mjGEOM_BOX
            body.add_geom(
                name=name + part, type=kind, size=(0.02, 0.02, 0.02), rgba=(*colour, 1), group=2,
                contype=2, conaffinity=3, condim=4, friction=(TABLE_FRICTION, 0.005, 0.0001), priority=priority,
                mass=0.01,
                solref=(0.02, 1), solimp=(0.99, 0.9995, 0.001, 0.5, 2),
            )  # fmt: skip

    found_and_force = sum(
        1 << int(getattr(mujoco.mjtConDataField, f"mjCONDATA_{k}")) for k in ("FOUND", "FORCE")
    )

    def add_contact_sensor(name: str, **objects) -> None:
        spec.add_sensor(
            name=name, type=mujoco.mjtSensor.mjSENS_CONTACT,
            intprm=(found_and_force, 3, 1),  # of all matching contacts, summed (3), in the world frame
            **objects,
        )  # fmt: skip

    add_object("item", task.item, RED if task.item == "cube" else BLUE)
    if task.support is not None:
        add_object("support", task.support, WHITE if task.support == "bin" else BLUE)
    body, subtree, geom = (getattr(mujoco.mjtObj, f"mjOBJ_{k}") for k in ("BODY", "XBODY", "GEOM"))
    add_contact_sensor("fixed_item", objtype=body, objname="gripper", reftype=body, refname="item")
    add_contact_sensor("jaw_item", objtype=body, objname="jaw", reftype=body, refname="item")
    add_contact_sensor(
        "hand_table", objtype=subtree, objname="gripper", reftype=geom, refname="table"
    )
    if task.support is not None:
        add_contact_sensor(
            "hand_support", objtype=subtree, objname="gripper", reftype=body, refname="support"
        )
    model = spec.compile()
    # The compiler notes that the bin's plates sit at their body's origin, and MuJoCo would then never read the
    # positions that each episode gives them.
    model.geom_sameframe[:] = 0
    return model
