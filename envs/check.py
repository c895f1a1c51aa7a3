"""What works on this machine: versions, devices, simulators and renderers, tried one by one.

    python -m envs.check

For everything that does not work, the line that installs it stands below it. Each probe really steps a simulator or
draws an image, in a process of its own with a time limit, so that a driver that crashes or hangs cannot take the
check with it. The exit status is 0 unless the embedded default, the SO-101 tasks on the CPU, cannot run; then it is 1.
The first run on a machine compiles kernels of MuJoCo Warp, which takes longer; they are cached.
"""

import argparse
import ctypes.util
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from envs import usable_cpus

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 300  # of one probe; what takes long is the first compilation of kernels
# The Python of this very environment, so that the printed lines work as they stand, whether or not it is activated.
_python = Path(sys.executable)
PYTHON = str(_python.relative_to(ROOT) if _python.is_relative_to(ROOT) else _python)
PIP = f"{PYTHON} -m pip install -e"
ANSWER = "envs.check answer: "  # marks the probe's line among what simulators print

SCENE = """
<mujoco>
  <worldbody>
    <light pos="0 0 2"/>
    <geom type="plane" size="1 1 0.1" rgba="0.2 0.2 0.2 1"/>
    <body pos="0 0 0.5">
      <freejoint/>
      <geom type="box" size="0.1 0.1 0.1" rgba="1 0 0 1"/>
    </body>
    <camera name="front" pos="0 -1 0.5" xyaxes="1 0 0 0 0 1"/>
  </worldbody>
</mujoco>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Probes: each returns one line about what worked, or raises
# ---------------------------------------------------------------------------------------------------------------------
def probe_devices() -> str:
    """Return the accelerators that torch and Warp see, one per line."""
    import torch

    lines = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"GPU     cuda:{i} is {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        )
    if not lines:
        lines.append("GPU     none that torch sees; everything runs on the CPU")
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            lines.append(
                "        a driver is here but this torch is a CPU-only build: see pytorch.org for CUDA builds"
            )
    if importlib.util.find_spec("warp"):
        import warp

        warp.config.quiet = True
        warp.init()
        lines.append("Warp    " + ", ".join(str(device) for device in warp.get_devices()))
    return "\n".join(lines)


def probe_mujoco() -> str:
    """Drop a box for 100 steps with MuJoCo's own C code."""
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    for _ in range(100):
        mujoco.mj_step(model, data)
    if not data.qpos[2] < 0.5:
        raise RuntimeError(
            f"the box did not fall: its height is {data.qpos[2]:.3f} m after 100 steps"
        )
    return f"{mujoco.__version__}, stepped"


def _warp_scene(device: str):
    """Put two environments of the scene on `device`; return (host model, model, data, warp, mujoco_warp)."""
    import mujoco
    import mujoco_warp
    import warp

    warp.config.quiet = True
    host_model = mujoco.MjModel.from_xml_string(SCENE)
    host_data = mujoco.MjData(host_model)
    mujoco.mj_forward(host_model, host_data)
    with warp.ScopedDevice(device):
        model = mujoco_warp.put_model(host_model)
        data = mujoco_warp.put_data(host_model, host_data, nworld=2)
    return host_model, model, data, warp, mujoco_warp


def probe_warp_physics(device: str) -> str:
    """Drop a box in two environments with MuJoCo Warp."""
    _, model, data, warp, mujoco_warp = _warp_scene(device)
    with warp.ScopedDevice(device):
        for _ in range(20):
            mujoco_warp.step(model, data)
        heights = data.qpos.numpy()[:, 2]
    if not (heights < 0.5).all():
        raise RuntimeError(f"the boxes did not fall: their heights are {heights} m")
    return f"{importlib.metadata.version('mujoco-warp')}, two environments stepped on {device}"


def probe_warp_renderer(device: str) -> str:
    """Draw a red box before a grey floor in two environments with MuJoCo Warp's renderer, and look at the colours."""
    host_model, model, data, warp, mujoco_warp = _warp_scene(device)
    with warp.ScopedDevice(device):
        context = mujoco_warp.create_render_context(
            host_model, nworld=2, cam_res=(16, 16), render_rgb=True
        )
        mujoco_warp.refit_bvh(model, data, context)
        mujoco_warp.render(model, data, context)
        pixels = warp.zeros((2, 16, 16), dtype=warp.vec3)
        mujoco_warp.get_rgb(context, 0, pixels)
        images = pixels.numpy()  # (2, 16, 16, 3), 0 to 1
    _expect_red_box(images[0] * 255.0)
    return f"two images of 16x16 drawn on {device}"


def probe_opengl() -> str:
    """Draw the same box with MuJoCo's OpenGL renderer on the backend that MUJOCO_GL names."""
    _find_opengl(os.environ["MUJOCO_GL"])
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, 64, 64)
    renderer.update_scene(data, camera="front")
    image = renderer.render()
    _expect_red_box(image)
    from OpenGL import GL

    driver = GL.glGetString(GL.GL_RENDERER).decode()
    renderer.close()
    return f"an image of 64x64 drawn by {driver}"


def _find_opengl(backend: str) -> None:
    """Raise RuntimeError where the system has no library for `backend`: OpenGL's own errors would not say so."""
    library = {"egl": "EGL", "osmesa": "OSMesa"}[backend]
    if sys.platform == "linux" and ctypes.util.find_library(library) is None:
        raise RuntimeError(f"the system has no lib{library}")


def _expect_red_box(image) -> None:
    """Raise RuntimeError unless the middle of `image` (H, W, 3; 0 to 255) is red and its corner is not."""
    middle, corner = image[image.shape[0] // 2, image.shape[1] // 2], image[0, 0]
    if not (middle[0] > 100 and middle[0] > 2 * middle[1] and corner[0] < 0.5 * middle[0]):
        raise RuntimeError(
            f"the image is wrong: a red box was drawn, its middle has the colour {middle.tolist()}"
        )


def _step_and_draw(make: Callable, env_id: str, num_envs: int, device: str) -> str:
    """Make a few environments of a task, take one step and look at the observation's shape."""
    import torch

    env = make(env_id, num_envs, device, seed=0)
    env.reset(seed=0)
    obs, rewards, *_ = env.step(torch.zeros(num_envs, env.action_dim, device=env.device))
    shape = tuple(obs["rgb"].shape)
    env.close()
    if shape != (num_envs, *env.image_shape) or not bool(torch.isfinite(rewards).all()):
        raise RuntimeError(f"{env_id} gave images of shape {shape} and rewards {rewards.tolist()}")
    return f"{env_id} stepped and drawn on {device}"


def probe_so101(device: str) -> str:
    """Try two environments of the embedded default."""
    from envs import so101

    return _step_and_draw(so101.make, "SO101ReachCube-v1", 2, device)


def probe_maniskill(device: str) -> str:
    """Try one environment of ManiSkill's PickCube-v1."""
    from envs import maniskill

    return _step_and_draw(maniskill.make, "PickCube-v1", 1, device)


def probe_vulkan() -> str:
    """Start SAPIEN's Vulkan renderer, which draws ManiSkill's images, the way envs/maniskill does."""
    import sapien
    import torch

    from envs import maniskill

    if not torch.cuda.is_available():
        maniskill.use_software_vulkan()
    return f"a renderer started on {sapien.render.RenderSystem().device.name}"


def probe_dmc() -> str:
    """Step a task of DeepMind Control's suite and one of its manipulation tasks, without an image."""
    for env_id in ("walker_walk", "reach_duplo"):
        task = _dmc_task(env_id, "warp")
        task.step(0 * task.low.astype("float32"))
    return "walker_walk and reach_duplo stepped"


def probe_dmc_image(renderer: str) -> str:
    """Draw DeepMind Control's walker with one of the renderers of envs/dmc and look for its colour."""
    if renderer != "warp":
        _find_opengl(renderer)
    task = _dmc_task("walker_walk", renderer)
    image = task.view()
    if renderer == "warp":
        from envs.dmc import warp_renderer, worker

        scene = warp_renderer.Scene(
            task.model, worker.slots(task.model), task.camera, 1, "cpu", task.size, 1
        )
        image = scene.draw(image[None])[0].numpy()
    share = (
        image[..., 0].astype(int) > image[..., 2].astype(int) + 40
    ).mean()  # orange before blue
    if not 0.005 < share < 0.5:
        raise RuntimeError(f"the image is wrong: {share:.1%} of it has the walker's colour")
    return f"an image of walker_walk, {share:.0%} of it walker"


def _dmc_task(env_id: str, renderer: str):
    """A task of envs/dmc/worker.py at the start of an episode."""
    from envs.dmc import worker

    task = worker.Task(env_id, image_size=64, action_repeat=2, camera=None, renderer=renderer, fast_render=False,
                           camera_jitter=0.0, colour_jitter=0.0)  # fmt: skip
    task.begin()
    return task


def probe_import(module: str) -> str:
    """Import `module`: for the simulators whose scripts have no probe of their own yet."""
    importlib.import_module(module)
    return "imports"


# ---------------------------------------------------------------------------------------------------------------------
# The list
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Probe:
    """One thing to try: how it is called, what tries it, and the line that installs it."""

    name: str
    run: Callable[..., str]
    argument: str | None = None
    install: str = f"{PIP} '.[so101]'"
    required: bool = False
    """Without it the embedded default cannot run."""
    environment: tuple[tuple[str, str], ...] = ()
    """Environment variables of the probe's process."""


# What a probe needs before its own line can help.
MISSING = {"mujoco": f"{PIP} '.[so101]'", "sapien": f"{PIP} '.[maniskill]'"}
EGL = "sudo apt-get install libegl1 libgl1-mesa-dri    (or the NVIDIA driver with its EGL library)"
OSMESA = "sudo apt-get install libosmesa6"
OPENGL = {name: (("MUJOCO_GL", name), ("PYOPENGL_PLATFORM", name)) for name in ("egl", "osmesa")}
DRIVER = "an NVIDIA driver that fits torch's CUDA (nvidia-smi tells)"
PROBES: dict[str, Probe] = {
    "devices": Probe("devices", probe_devices, install="make setup", required=True),
    "mujoco": Probe("MuJoCo (C)", probe_mujoco, required=True),
    "warp-physics": Probe("MuJoCo Warp", probe_warp_physics, "cpu"),
    "warp-physics-cuda": Probe("MuJoCo Warp, GPU", probe_warp_physics, "cuda:0", install=DRIVER),
    "so101": Probe("SO-101 tasks", probe_so101, "cpu", required=True),
    "so101-cuda": Probe("SO-101 tasks, GPU", probe_so101, "cuda", install=DRIVER),
    "maniskill": Probe("ManiSkill 3", probe_maniskill, "cpu", install=f"{PIP} '.[maniskill]'"),
    "maniskill-cuda": Probe(
        "ManiSkill 3, GPU", probe_maniskill, "cuda", install=f"{PIP} '.[maniskill]'"
    ),
    "dmc": Probe(
        "DeepMind Control",
        probe_dmc,
        install=f"{PIP} '.[dmc]'",
        environment=(("MUJOCO_GL", "disabled"),),
    ),
    "warp-renderer": Probe("MuJoCo Warp", probe_warp_renderer, "cpu", required=True),
    "warp-renderer-cuda": Probe("MuJoCo Warp, GPU", probe_warp_renderer, "cuda:0", install=DRIVER),
    "egl": Probe("OpenGL by EGL", probe_opengl, install=EGL, environment=OPENGL["egl"]),
    "osmesa": Probe("OpenGL by OSMesa", probe_opengl, install=OSMESA, environment=OPENGL["osmesa"]),
    "dmc-egl": Probe(
        "DM Control by EGL", probe_dmc_image, "egl", install=EGL, environment=OPENGL["egl"]
    ),
    "dmc-osmesa": Probe(
        "DM Control by OSMesa", probe_dmc_image, "osmesa", OSMESA, environment=OPENGL["osmesa"]
    ),
    "dmc-warp": Probe(
        "DM Control by Warp", probe_dmc_image, "warp", environment=(("MUJOCO_GL", "disabled"),)
    ),
    "vulkan": Probe(
        "Vulkan by SAPIEN",
        probe_vulkan,
        install=f"{PYTHON} scripts/install_software_vulkan.py    (or the driver of the GPU with its Vulkan library)",
    ),
}
SIMULATORS = [
    "mujoco", "warp-physics", "warp-physics-cuda", "so101", "so101-cuda", "maniskill", "maniskill-cuda", "dmc",
]  # fmt: skip
RENDERERS = [
    "warp-renderer",
    "warp-renderer-cuda",
    "egl",
    "osmesa",
    "dmc-egl",
    "dmc-osmesa",
    "dmc-warp",
    "vulkan",
]

# Not needed by any script so far; shown where they happen to be installed.
GUESTS = {
    "mujoco.mjx": "MuJoCo MJX",
    "mujoco_playground": "MuJoCo Playground",
    "newton": "Newton",
    "robosuite": "robosuite",
}


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """What came of one probe: whether it works, and one line (of `devices`: several) about it."""

    works: bool
    detail: str


def _one_line(error: BaseException) -> str:
    """Return the error's first line, and its type where the message alone would not tell."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    speaks = isinstance(error, RuntimeError | ImportError) and message
    return message if speaks else f"{type(error).__name__}: {message}".rstrip(": ")


def answer(key: str) -> int:
    """Run one probe in this process and print its result as the last line. Returns the exit status."""
    if key not in PROBES and key not in GUESTS:
        print(
            f"envs.check: no probe is called {key!r}; there are {', '.join([*PROBES, *GUESTS])}",
            file=sys.stderr,
        )
        return 2
    probe = PROBES.get(key) or Probe(GUESTS[key], probe_import, key)
    try:
        result = Result(True, probe.run(*([probe.argument] if probe.argument else [])))
    except ModuleNotFoundError as error:
        result = Result(False, f"{error.name} is not installed" if error.name else _one_line(error))
    except Exception as error:  # whatever a driver or a simulator raises is the finding
        result = Result(False, _one_line(error))
    print(ANSWER + json.dumps([result.works, result.detail]), flush=True)
    # A driver may crash while the interpreter shuts down, after the question has been answered.
    os._exit(0)


def ask(key: str) -> Result:
    """Run one probe in a process of its own and return its result; a crash or a hang is a result too."""
    environment = {**os.environ, **dict(PROBES[key].environment if key in PROBES else ())}
    command = [sys.executable, "-m", "envs.check", "--probe", key]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Result(False, f"gave no answer in {TIMEOUT_S} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(ANSWER):
            return Result(*json.loads(line.removeprefix(ANSWER)))
    if done.returncode < 0:
        return Result(False, f"its process was ended by {signal.Signals(-done.returncode).name}")
    last = (done.stderr.strip().splitlines() or ["and said nothing"])[-1]
    return Result(False, f"its process ended with status {done.returncode}: {last}")


# ---------------------------------------------------------------------------------------------------------------------
# Versions
# ---------------------------------------------------------------------------------------------------------------------
def pins() -> dict[str, list[tuple[str, str]]]:
    """Return {extra: [(package, pinned version)]} of the installed cleanrobot; the core's extra is ''.

    Raises importlib.metadata.PackageNotFoundError where the project is not installed.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for requirement in importlib.metadata.requires("cleanrobot") or []:
        match = re.match(
            r"([\w.-]+)\s*==\s*([\w.+!-]+)\s*(?:;.*extra\s*==\s*['\"]([\w-]+)['\"])?", requirement
        )
        if match and (match[3] or "") != "all":
            found.setdefault(match[3] or "", []).append((match[1], match[2]))
    return found


def version_lines() -> list[str]:
    """Return one line per group of packages, and one more for each package that is missing or not the pinned one."""
    try:
        groups = pins()
    except importlib.metadata.PackageNotFoundError:
        return [f"cleanrobot is not installed for {sys.executable}", "      make setup"]
    lines = []
    if Path(sys.prefix) != ROOT / ".venv" and (ROOT / ".venv").exists():
        lines += [
            f"These are of {sys.prefix}; for the environment that make has built:",
            "      make check",
        ]
    for extra, packages in groups.items():
        target = f"'.[{extra}]'" if extra else "."
        present, wrong = [], []
        for package, pinned in packages:
            try:
                installed = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
            present.append(f"{package} {installed}")
            if installed.split("+")[0] != pinned:
                wrong.append(
                    f"      {package} {installed} is not the tested {pinned}:  {PIP} {target}"
                )
        label = f"[{extra}]" if extra else "core"
        if len(present) == len(packages):
            lines.append(f"{label:<12} {', '.join(present)}")
        else:
            have = f"only {', '.join(present)}" if present else "not installed"
            lines += [f"{label:<12} {have}", f"      {PIP} {target}"]
        lines += wrong
    return lines


def machine_lines() -> list[str]:
    """Return what the standard library knows: cores, memory, compiler."""
    cores = usable_cpus()
    memory = ""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB of memory"
    compiler = next(
        (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
    )
    lines = [f"CPU     {cores} cores{memory}"]
    if compiler:
        lines.append(f"C++     {compiler} (torch.compile on the CPU can use it)")
    else:
        lines += [
            "C++     none, so no torch.compile on the CPU (nothing needs it)",
            "      sudo apt-get install g++",
        ]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------
def main() -> int:
    """Print the report. Returns the exit status: 1 where the embedded default cannot run, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m envs.check", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--probe", metavar="NAME", help="run one probe in this process and print its result"
    )
    arguments = parser.parse_args()
    if arguments.probe:
        return answer(arguments.probe)

    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print("\nVersions", *version_lines(), sep="\n  ")
    print("\nMachine", *machine_lines(), sep="\n  ", flush=True)
    devices = ask("devices")
    print(*("  " + line for line in devices.detail.splitlines()), sep="\n", flush=True)
    gpu = devices.works and "cuda:0" in devices.detail

    broken = [] if devices.works else ["torch"]
    # Two at a time: most of a probe is waiting for imports, and more would slow each other's compilers down.
    with ThreadPoolExecutor(max_workers=2) as pool:
        guests = [
            module
            for module in GUESTS
            if importlib.util.find_spec(module.split(".")[0]) and _importable(module)
        ]
        sections = {"Simulators": SIMULATORS + guests, "Renderers": RENDERERS}
        keys = [
            key
            for section in sections.values()
            for key in section
            if gpu or not key.endswith("-cuda")
        ]
        answers = {key: pool.submit(ask, key) for key in keys}
        for title, section in sections.items():
            print(f"\n{title}")
            for key in (key for key in section if key in answers):
                result = answers[key].result()
                probe = PROBES.get(key)
                name = probe.name if probe else GUESTS[key]
                print(f"  {'works' if result.works else 'no':<6} {name:<20} {result.detail}")
                if not result.works and probe:
                    print(
                        f"      {MISSING.get(result.detail.removesuffix(' is not installed'), probe.install)}"
                    )
                    broken += [probe.name] if probe.required else []
                sys.stdout.flush()
    if broken:
        print(
            f"\nThe embedded default cannot run here: {', '.join(broken)} failed; the lines above say what to do."
        )
        return 1
    print("\nThe embedded default runs here: make train")
    return 0


def _importable(module: str) -> bool:
    """Whether `module`, whose top-level package is there, is there too."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
