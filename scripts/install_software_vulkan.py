"""Unpack a software Vulkan driver (Mesa's lavapipe, 25 or newer) into a cache folder, without touching the system.

ManiSkill's renderer SAPIEN needs Vulkan with `descriptorBindingPartiallyBound`. Debian 12 ships Mesa 22.3, whose
lavapipe lacks it; Debian's own backports carry Mesa 25, whose lavapipe has it. This script asks apt, with package lists
of its own, which packages that driver needs beyond the installed ones, downloads them (apt checks the signatures),
unpacks them into `--dir`, keeps the shared libraries, and writes the driver file (ICD) that a Vulkan loader reads.
No root is needed. `envs/maniskill` finds the default folder by itself.

    python scripts/install_software_vulkan.py                 # into ~/.cache/cleanrobot/vulkan
    python scripts/install_software_vulkan.py --dir FOLDER    # elsewhere; then CLEANROBOT_VULKAN_DIR=FOLDER names it

Debian 12 (bookworm) only. Elsewhere the system's package `mesa-vulkan-drivers` is the way; the script then says so.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT_DIR = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cleanrobot" / "vulkan"
)
RELEASE = "bookworm"
PACKAGE = "mesa-vulkan-drivers"
NEVER = {
    "libc6",
    "libgcc-s1",
    "libstdc++6",
}  # part of every running Debian; a second copy in one process would clash


def fail(message: str) -> None:
    """Ends the script with one line on stderr and exit status 1."""
    sys.exit(f"install_software_vulkan: {message}")


def run(command: list[str], cwd: Path | None = None) -> str:
    """Runs a command and returns its standard output; on failure ends the script with the command's last error line."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("E:")] or lines[-1:] or ["no message"]
        fail(f"`{command[0]} ... {command[-1]}` failed: {errors[0]}")
    return done.stdout


def check_system(os_release: Path = Path("/etc/os-release")) -> None:
    """Ends the script unless this is Debian 12 with apt-get and dpkg-deb."""
    release = {}
    if os_release.exists():
        for line in os_release.read_text().splitlines():
            key, _, value = line.partition("=")
            release[key] = value.strip('"')
    if release.get("ID") != "debian" or release.get("VERSION_CODENAME") != RELEASE:
        name = release.get("PRETTY_NAME", sys.platform)
        fail(
            f"made for Debian 12 (bookworm), this is {name}: install the system's own Vulkan drivers instead "
            f"(on Debian and Ubuntu `sudo apt-get install {PACKAGE} libvulkan1`; Mesa 25 is known to work)."
        )
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            fail(f"needs `{tool}`, which is not on the PATH.")


def debian_mirror() -> str:
    """Base address of the Debian archive that this machine's apt is set up with."""
    found = re.search(rf"'(\S+)/dists/{RELEASE}/", run(["apt-get", "--print-uris", "update"]))
    if found is None:
        fail(
            f"apt has no source for the suite `{RELEASE}`; give an archive's address with --mirror."
        )
    return found.group(1)


def fetch_packages(mirror: str, work: Path) -> list[Path]:
    """Downloads the driver's package and those it needs that are not installed; returns the .deb files."""
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    signed = f"[signed-by={keyring}] " if keyring.exists() else ""
    sources = work / "sources.list"
    sources.write_text(
        "".join(f"deb {signed}{mirror} {s} main\n" for s in (RELEASE, f"{RELEASE}-backports"))
    )
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (work / folder).mkdir(parents=True)
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
        "Debug::NoLocking": "1",  # the installed-package database is only read, so its lock (root's) is not wanted
    }
    if os.geteuid() == 0:
        options["APT::Sandbox::User"] = (
            "root"  # apt's own user may not enter a private cache folder
        )
    apt = ["apt-get", "-qq"] + [
        word for key, value in options.items() for word in ("-o", f"{key}={value}")
    ]
    run([*apt, "-o", "APT::Update::Error-Mode=any", "update"])
    newest = f"{PACKAGE}/{RELEASE}-backports"
    plan = run([*apt, "install", "--simulate", "--reinstall", "--no-install-recommends", newest])
    wanted = [
        f"{n}={v}"
        for n, v in re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+)", plan, re.M)
        if n not in NEVER
    ]
    if not any(name.startswith(f"{PACKAGE}=") for name in wanted):
        fail(f"apt offers no {PACKAGE} in {RELEASE}-backports at {mirror}.")
    print("packages:", ", ".join(wanted))
    run([*apt, "download", *wanted], cwd=work / "debs")
    return sorted((work / "debs").glob("*.deb"))


def unpack(debs: list[Path], work: Path, target: Path) -> Path:
    """Unpacks the packages, moves their shared libraries to `target/lib` and writes the ICD file; returns its path."""
    for deb in debs:
        run(["dpkg-deb", "-x", str(deb), str(work / "root")])
    icds = list((work / "root/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
    if not icds:
        fail(f"the downloaded {PACKAGE} holds no lavapipe driver file (lvp_icd*.json).")
    description = json.loads(icds[0].read_text())
    staged = work / "lib"
    staged.mkdir()
    for pattern in ("usr/lib/*/*.so*", "lib/*/*.so*", "usr/lib/llvm-*/lib/*.so*"):
        for path in (work / "root").glob(pattern):
            # only the driver and the names by which libraries ask for each other (libX.so.1), links followed
            wanted = path.name == "libvulkan_lvp.so" or re.search(r"\.so\.\d+$", path.name)
            if wanted and path.exists():
                shutil.copy2(path.resolve(), staged / path.name)
    lib = target / "lib"
    if lib.exists():
        shutil.rmtree(lib)
    target.mkdir(parents=True, exist_ok=True)
    shutil.move(str(staged), str(lib))
    description["ICD"]["library_path"] = str(lib / "libvulkan_lvp.so")
    icd = target / "lvp_icd.json"
    icd.write_text(json.dumps(description, indent=2) + "\n")
    return icd


def check_libraries(target: Path) -> bool:
    """Whether the driver loads with the system's libraries alone; ends the script if some are found nowhere."""
    driver = str(target / "lib" / "libvulkan_lvp.so")
    plain = subprocess.run(["ldd", driver], capture_output=True, text=True).stdout
    if "not found" not in plain:
        return True
    search = ":".join(filter(None, [str(target / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]))
    env = {**os.environ, "LD_LIBRARY_PATH": search}
    full = subprocess.run(["ldd", driver], capture_output=True, text=True, env=env).stdout
    missing = sorted(set(re.findall(r"(\S+) => not found", full)))
    if missing:
        fail(
            f"the driver misses {', '.join(missing)}; `apt-file search NAME` tells the Debian package of each."
        )
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--dir", type=Path, default=DEFAULT_DIR, help="cache folder (default: %(default)s)"
    )
    parser.add_argument(
        "--mirror", help="address of a Debian archive (default: the one apt is set up with)"
    )
    args = parser.parse_args()
    target = args.dir.expanduser().resolve()
    check_system()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot create the cache folder: {error}")
    # inside the cache folder, so that the final move stays on one disk
    with tempfile.TemporaryDirectory(dir=target, prefix="download-") as work:
        mirror = (args.mirror or debian_mirror()).rstrip("/")
        icd = unpack(fetch_packages(mirror, Path(work)), Path(work), target)
    alone = check_libraries(target)
    default = target == DEFAULT_DIR.resolve()
    hint = (
        "envs/maniskill finds it by itself" if default else f"export CLEANROBOT_VULKAN_DIR={target}"
    )
    print(f"installed in {target}; {hint}. For other Vulkan programs:")
    print(f"export VK_ICD_FILENAMES={icd}")
    if not alone:
        print(f"export LD_LIBRARY_PATH={target / 'lib'}:$LD_LIBRARY_PATH")


if __name__ == "__main__":
    main()
