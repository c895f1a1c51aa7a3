"""Changes to ManiSkill while a scene is built; `patches` lists them."""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import numpy as np


@contextmanager
def patches(cpu: bool, light_visuals: bool, active: bool = True) -> Iterator[None]:
    """Changes to ManiSkill while a scene is built, undone afterwards. None of them touches the physics.

    1. `parse_backend_device_id` splits a device's name at every colon, which breaks the documented `pci:0`.
    2. SAPIEN fills a reflection table (BRDF lookup) by a compute shader at each process's first image, many seconds
       on a software driver. Only the light of an environment map reads it, so scenes without one get a tiny table.
    3. The ground is a plane cut into 20,000 triangles; two triangles with the same texture coordinates draw the same.
    4. With `light_visuals` (the one that changes pixels) robots are drawn by their collision shapes.

    Also, where a robot's files are missing, ManiSkill asks on the terminal whether to download them, and a process
    without one fails there obscurely; that question becomes an error.
    """
    if not active:
        yield
        return
    # by name: `mani_skill.utils` as an attribute is another package once `mani_skill.envs` is imported
    backend = import_module("mani_skill.envs.utils.system.backend")
    ground = import_module("mani_skill.utils.building.ground")
    download = import_module("mani_skill.utils.download_asset")
    from mani_skill.agents.base_agent import BaseAgent
    from mani_skill.sensors.camera import Camera
    from mani_skill.utils.building.articulation_builder import ArticulationBuilder

    with ExitStack() as undo:

        def swap(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        def refuse(question: str) -> bool:
            robot = re.match(r"Robot (\S+) has assets", question)
            name = robot.group(1) if robot else "ID"
            raise RuntimeError(
                f"files are missing, run `python -m mani_skill.utils.download_asset {name}`"
            )

        swap(download, "prompt_yes_no", refuse)
        if cpu:
            parse, build_camera, build_ground = (
                backend.parse_backend_device_id,
                Camera.__init__,
                ground.build_ground,
            )

            def parse_with_pci(name: str) -> Any:
                return (name, None) if name.startswith("pci:") else parse(name)

            def build_camera_with_table(self: Any, *args: Any, **kwargs: Any) -> None:
                build_camera(self, *args, **kwargs)
                _skip_reflection_table(self)

            def build_flat_ground(
                scene: Any,
                floor_width: int = 100,
                floor_length: int | None = None,
                xy_origin: tuple = (0, 0),
                altitude: float = 0,
                **kwargs: Any,
            ) -> Any:
                actor = build_ground(scene, 1, 1, xy_origin, altitude, **kwargs)
                square = kwargs.get("texture_square_len", 4)
                _flatten_ground(
                    actor, floor_width, floor_length or floor_width, xy_origin, altitude, square
                )
                return actor

            swap(backend, "parse_backend_device_id", parse_with_pci)
            swap(Camera, "__init__", build_camera_with_table)
            for name, module in list(sys.modules.items()):
                if (
                    name.startswith("mani_skill.")
                    and getattr(module, "build_ground", None) is build_ground
                ):
                    swap(module, "build_ground", build_flat_ground)
        if light_visuals:
            load_robot, build = BaseAgent._load_articulation, ArticulationBuilder.build

            def build_light(self: Any, *args: Any, **kwargs: Any) -> Any:
                _lighten(self)
                return build(self, *args, **kwargs)

            def load_light_robot(self: Any, *args: Any, **kwargs: Any) -> Any:
                ArticulationBuilder.build = build_light
                try:
                    return load_robot(self, *args, **kwargs)
                finally:
                    ArticulationBuilder.build = build

            swap(BaseAgent, "_load_articulation", load_light_robot)
        yield


def _skip_reflection_table(camera: Any) -> None:
    """Gives a rasterising camera a tiny reflection table, unless its scene has an environment map that would use it."""
    import sapien

    if camera.config.shader_config.shader_pack.startswith("rt"):
        return
    if any(scene.render_system.cubemap is not None for scene in camera.camera.scene.sub_scenes):
        return
    # (scale, bias) = (1, 0): reflect the surface's own specular colour, at every angle and roughness
    table = np.tile(np.array([1, 0, 0, 0], np.float32), (2, 2, 1))
    for part in camera.camera._render_cameras:
        part.set_texture(
            "BRDFLUT",
            sapien.render.RenderTexture(table, 2, "R32G32B32A32Sfloat", 1, "linear", "edge"),
        )


def _flatten_ground(
    actor: Any, width: float, length: float, xy_origin: tuple, altitude: float, square: float
) -> None:
    """Replaces a ground actor's image by one rectangle, `length` x `width` m, with a texture tile each `square` m."""
    import sapien

    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * 0.5 * np.array([length, width])
    vertices = np.column_stack([corners + np.asarray(xy_origin), np.full(4, altitude)])
    for entity in actor._objs:
        old = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        if old is None:
            continue
        shape = sapien.render.RenderShapeTriangleMesh(
            vertices=vertices.astype(np.float32),
            triangles=np.array([[0, 1, 2], [1, 3, 2]]),
            normals=np.tile(np.array([0, 0, 1], np.float32), (4, 1)),
            uvs=(corners / square + 0.5).astype(np.float32),
            material=old.render_shapes[0].material,
        )
        entity.remove_component(old)
        body = sapien.render.RenderBodyComponent()
        body.attach(shape)
        entity.add_component(body)


def _lighten(builder: Any) -> None:
    """Makes every link with a mesh image and collision shapes look like the latter."""
    import sapien
    from sapien.wrapper.actor_builder import VisualShapeRecord

    grey = sapien.render.RenderMaterial(
        base_color=[0.85, 0.85, 0.87, 1.0], roughness=0.6, specular=0.3
    )
    for link in builder.link_builders:
        shapes = [record for record in link.collision_records if record.type != "plane"]
        if not shapes or all(record.type != "file" for record in link.visual_records):
            continue
        link.visual_records = [
            VisualShapeRecord(
                type="file" if "mesh" in record.type else record.type,
                filename=record.filename,
                scale=record.scale,
                radius=record.radius,
                length=record.length,
                pose=record.pose,
                material=grey,
            )
            for record in shapes
        ]
