"""The folders of this process's control groups, in which Linux shows the limits of a container.

    version 2    /sys/fs/cgroup/GROUP with memory.max, cpu.max ...
    version 1    /sys/fs/cgroup/CONTROLLER/GROUP with cpu.cfs_quota_us ...

A group lies within its parents, so each parent's limit holds too. This file imports nothing else of
the package.
"""

import contextlib
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")


def cgroup_folders(controller: str) -> list[Path]:
    """Return the folder of this process's group and those of its parents; none if unknown.

    controller: memory or cpu.
    """
    with contextlib.suppress(OSError):
        return _folders(GROUPS.read_text(encoding="utf-8"), controller)
    return [MOUNT]


def _folders(groups: str, controller: str) -> list[Path]:
    """Return the folders that the lines `ID:CONTROLLERS:/GROUP` of /proc/self/cgroup name."""
    found = []
    for line in groups.splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):  # version 1
            return _with_parents(MOUNT / controller, group)
        if not controllers:  # version 2, unless version 1 has the controller
            found = _with_parents(MOUNT, group)
    return found


def _with_parents(mount: Path, group: str) -> list[Path]:
    """Return the folder of a group below `mount`, and the folders above it up to `mount`."""
    path = Path("/") / group.strip("/")
    return [mount / part.relative_to("/") for part in (path, *path.parents)]
