"""Checks that this Python and this host can run the pack, and says what is missing.

ComfyUI-Manager runs it without arguments in the host's Python, Automatic1111 and Forge at every start;
`python install.py` does the same by hand. It needs only the standard library, changes nothing and installs
nothing: every package comes with the host.
Exit code 0: usable. 1: not usable, and the lines above say why and what to do. In a webui it is always 0: the
webui prints anything else as an error block, and its packages are pinned, so that nobody should replace them.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

PYTHON = (3, 10)
HOST = (0, 3, 64)
# Distribution -> the oldest version the pack is written for. All of them come with ComfyUI.
PACKAGES = {
    "torch": (2, 1),
    "safetensors": (0, 4, 2),
    "numpy": (1, 25),
    "Pillow": (9, 1),
    "tqdm": (4, 60),
}
REPAIR = (
    "Install ComfyUI's requirements into this Python (its requirements.txt; for torch follow ComfyUI's "
    "manual, so that the build fits your GPU), then start ComfyUI again."
)


def numbers(version):
    """The leading numbers of a version: '2.13.0+cpu' -> (2, 13, 0); () when it starts with none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def dotted(version):
    return ".".join(str(part) for part in version)


def installed_version(name):
    """The version of an installed distribution, or None. Nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_host(pack):
    """The ComfyUI folder that holds `pack` in its custom_nodes, or None. A link counts at both ends."""
    for folder in (pack.absolute(), pack.resolve()):
        host = folder.parent.parent
        if folder.parent.name == "custom_nodes" and (host / "main.py").is_file():
            return host
    return None


def find_webui(pack):
    """The webui's folder that has `pack` among its extensions, or None. A link counts at both ends.

    With --data-dir the extensions lie elsewhere; the webui runs this file with itself on PYTHONPATH.
    """
    for folder in (pack.absolute(), pack.resolve()):
        for host in (folder.parent.parent, *map(Path, sys.path)):
            if folder.parent.name == "extensions" and (host / "webui.py").is_file():
                return host
    return None


def host_version(host):
    """What comfyui_version.py says, read and not imported; None when it is not there."""
    try:
        text = (host / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found.group(1) if found else None


def check_python(version):
    """(lines, problems) for the interpreter."""
    if tuple(version[:2]) >= PYTHON:
        return [f"Python {dotted(version[:3])}"], []
    return [], [f"Python {dotted(version[:3])} is too old: {dotted(PYTHON)} or newer is needed."]


def check_packages(version_of, packages=PACKAGES):
    """(lines, problems) for the packages; `version_of` maps a distribution's name to its version or None."""
    lines, problems = [], []
    for name, oldest in packages.items():
        found = version_of(name)
        if found is None:
            problems.append(f"{name} is not installed: {dotted(oldest)} or newer is needed.")
        elif numbers(found) < oldest:
            problems.append(f"{name} {found} is too old: {dotted(oldest)} or newer is needed.")
        else:
            lines.append(f"{name} {found}")
    return lines, problems


def check_host(host):
    """(lines, problems) for the ComfyUI folder. No folder is no problem: the core works without a host."""
    if host is None:
        return ["ComfyUI: not found two folders up, so its version was not checked"], []
    found = host_version(host)
    if found is None or numbers(found) < HOST:
        found = found or "of unknown version"
        return [], [f"ComfyUI {found} is too old: {dotted(HOST)} or newer is needed. Update {host}."]
    return [f"ComfyUI {found}"], []


def main(pack=Path(__file__).parent, python=tuple(sys.version_info), version_of=installed_version):
    """Print what was found and what is missing; the exit code."""
    if find_webui(pack) is not None:
        return webui_main(python, version_of)
    lines, problems = check_python(python)
    packages, missing = check_packages(version_of)
    host, host_problems = check_host(find_host(pack))
    print("ComfyUI Spectral Adapters: " + ", ".join(lines + host + packages))
    if missing:
        missing.append(REPAIR)
    problems += host_problems + missing
    for problem in problems:
        print("  ! " + problem)
    print("It cannot run here yet." if problems else "Everything it needs is here.")
    return 1 if problems else 0


def webui_main(python, version_of):
    """The same in a webui: one quiet line where all is well, and the code 0 in any case."""
    lines, problems = check_python(python)
    packages, missing = check_packages(version_of, PACKAGES)
    if problems + missing:
        print("Spectral Adapters cannot run in this webui: " + " ".join(problems + missing))
        print("Update the webui itself; its own packages should not be replaced one by one.")
    else:
        print("Spectral Adapters: " + ", ".join(lines + packages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
