"""Vulkan drivers: the one in software that `scripts/install_software_vulkan.py` unpacks, and whether any works."""

import ctypes
import os
from pathlib import Path
from typing import Any


def vulkan_cache() -> Path:
    """The folder where `scripts/install_software_vulkan.py` unpacks its driver."""
    named = os.environ.get("CLEANROBOT_VULKAN_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "cleanrobot" / "vulkan"


def use_software_vulkan() -> bool:
    """Points this process's Vulkan at the unpacked software driver; True if it did.

    Does nothing where the user names a driver already (`VK_ICD_FILENAMES` or `VK_DRIVER_FILES`) or none was unpacked.
    Must run before Vulkan is first used in the process. The driver's own libraries that the system lacks are loaded
    here by their full path, since `LD_LIBRARY_PATH` is only read when a process starts.
    """
    folder = vulkan_cache()
    icd, driver = folder / "lvp_icd.json", folder / "lib" / "libvulkan_lvp.so"
    if os.environ.get("VK_ICD_FILENAMES") or os.environ.get("VK_DRIVER_FILES"):
        return False
    if not (icd.exists() and driver.exists()):
        return False
    os.environ["VK_ICD_FILENAMES"] = str(icd)
    waiting = [path for path in sorted(driver.parent.iterdir()) if path != driver]
    while not _loads(driver) and waiting:
        # a library loads once those it needs are loaded: go round until nothing more does
        left = [path for path in waiting if not _loads(path)]
        if len(left) == len(waiting):
            break
        waiting = left
    return True


def _loads(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def check_vulkan(sapien: Any, render_backend: str) -> None:
    """Raises RuntimeError with one line unless SAPIEN can start its renderer on that device."""
    try:
        sapien.render.RenderSystem(sapien.Device(render_backend))
    except RuntimeError as error:
        raise RuntimeError(
            f"no Vulkan driver here that ManiSkill's renderer can use ({error}): run "
            "`python scripts/install_software_vulkan.py`, or name a driver file by VK_ICD_FILENAMES"
        ) from None
