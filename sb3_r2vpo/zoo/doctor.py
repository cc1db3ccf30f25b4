"""``r2vpo doctor``: what is installed, what this machine has, and what is known not to work, with the remedy."""

import argparse
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata

from sb3_r2vpo import __version__

#: Why versions are excluded, where it is not plain from the number
REASONS = {
    "mujoco": "dm_control fails on MuJoCo 4, whose MjModel has no attribute flex_vertedge",
    "pandas": "rl_zoo3's plot scripts fail with pandas 3, through rliable and arch",
}
#: Extras of several others
_UNIONS = ("all", "dev")
#: What MuJoCo can render with, in the order in which to try
GL_BACKENDS = ("egl", "osmesa", "glfw")
_RENDER = """
import mujoco
with mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16) as renderer:
    renderer.render()
"""


def main(arguments: Sequence[str]) -> None:
    """Say what is installed, what this machine has, and what is known not to work, with the remedy.

    examples:
      r2vpo doctor
      r2vpo doctor --no-render              leaves out the OpenGL of the simulators, which takes seconds

    The exit status is 1 if there is something to mend; an extra that is not installed is nothing to mend.
    """
    parser = argparse.ArgumentParser(
        prog="r2vpo doctor", description=inspect.getdoc(main), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-render", action="store_true", help="do not try to render")
    options = parser.parse_args(arguments)
    print(f"sb3-r2vpo {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    lines, problems = check_packages()
    machine, more = check_machine()
    rendering, others = ([], []) if options.no_render else check_rendering()
    print("\n".join([*lines, "", *machine, *rendering, ""]))
    problems += more + others
    if problems:
        print("To mend:\n" + "\n".join(f"- {problem}" for problem in problems))
        sys.exit(1)
    print("Nothing to mend.")


def check_packages() -> tuple[list[str], list[str]]:
    """
    Compare what is installed with the requirements of this package.

    :return: Lines to print, and what to mend
    """
    # Of Stable-Baselines3's own dependencies
    from packaging.requirements import Requirement

    try:
        requirements = metadata.requires("sb3-r2vpo") or []
    except metadata.PackageNotFoundError:
        return [], ["sb3-r2vpo is not installed, so that its requirements are unknown: pip install -e . in its checkout."]
    found: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    problems = []
    for requirement in map(Requirement, requirements):
        extra = _extra_of(requirement)
        if extra in _UNIONS or not (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
            continue
        version = _version(requirement.name)
        if version is None:
            missing.setdefault(extra, []).append(requirement.name)
            continue
        found.setdefault(extra, []).append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            reason = f": {REASONS[requirement.name]}" if requirement.name in REASONS else ""
            problems.append(f"{requirement.name} is {version}, not {requirement.specifier}{reason}. pip install '{wanted}'")
    problems += [f"{name} is missing. pip install {name}" for name in missing.pop("", [])]
    lines = [f"{f'extra {extra}' if extra else 'packages'}: {', '.join(names)}" for extra, names in found.items()]
    lines += [
        f"not installed of the extra {extra}: {', '.join(names)}; in a checkout, pip install -c constraints.txt '.[{extra}]'"
        for extra, names in missing.items()
    ]
    return lines, list(dict.fromkeys(problems))


def _extra_of(requirement: object) -> str:
    extra = re.search(r"extra == [\"']([\w-]+)[\"']", str(requirement))
    return extra[1].replace("-", "_") if extra else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_machine() -> tuple[list[str], list[str]]:
    """
    Look at CPUs, threads, devices and the compiler.

    :return: Lines to print, and what to mend
    """
    import torch as th

    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [th.cuda.get_device_name(i) for i in range(th.cuda.device_count())]
    devices += ["Apple's GPU (mps)"] if th.backends.mps.is_available() else []
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    lines = [
        f"CPUs: {n_cpus} of {os.cpu_count()} for this process; PyTorch's threads: {th.get_num_threads()}, "
        f"of which `r2vpo train` takes one or two; OMP_NUM_THREADS is {os.environ.get('OMP_NUM_THREADS') or 'not set'}",
        f"GPUs: {', '.join(devices) or 'none that PyTorch can use'}; PyTorch is built for CUDA {th.version.cuda or '(none)'}",
        f"C++ compiler, for compile=True: {compiler or 'none'}",
    ]
    problems = []
    if shutil.which("nvidia-smi") and not th.cuda.is_available():
        problems.append(
            "There is an NVIDIA driver, and PyTorch can't use it: see https://pytorch.org/get-started for its build."
        )
    return lines, problems


def check_rendering() -> tuple[list[str], list[str]]:
    """
    Try each of MuJoCo's ways to render, in a process of its own, as GLFW aborts without a display.

    :return: Lines to print, and what to mend
    """
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    lines = [f"display: {display or 'none; `r2vpo enjoy` takes --no-render, and `r2vpo record-video` does without'}"]
    if _version("mujoco") is None:
        return lines, []
    working = [backend for backend in GL_BACKENDS if renders(backend)]
    chosen = os.environ.get("MUJOCO_GL")
    lines.append(f"MuJoCo renders with: {', '.join(working) or 'none'}; MUJOCO_GL is {chosen or 'not set'}")
    if not working:
        return lines, ["MuJoCo can't render, for videos: apt-get install libegl1 libosmesa6"]
    if chosen in GL_BACKENDS and chosen not in working:
        return lines, [f"MUJOCO_GL is {chosen}, which does not work here: export MUJOCO_GL={working[0]}"]
    return lines, []


def renders(backend: str) -> bool:
    """
    :param backend: What ``MUJOCO_GL`` is to be
    :return: Whether MuJoCo can make an OpenGL context with it
    """
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": "" if backend == "glfw" else backend}
    try:
        return not subprocess.run([sys.executable, "-c", _RENDER], env=environment, capture_output=True, timeout=60).returncode
    except subprocess.TimeoutExpired:
        return False
