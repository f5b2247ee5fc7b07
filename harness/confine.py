"""Runs a command that may read some folders, write in others, and reach nothing else.

    python confine.py --read DIR ... --write DIR ... -- COMMAND ...

On Linux with Landlock (5.13 or later) the kernel holds it to that: other files cannot be opened,
and other processes can be neither read nor, from 6.12 on, signalled. Elsewhere the command runs
as it is; `available` says which. Standard library only, since it is run as a script.
https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all architectures
VERSION_FLAG, PATH_BENEATH = 1, 1
NO_NEW_PRIVS, NOT_DUMPABLE, SUBREAPER = 38, 4, 36  # options of prctl

# By the version that brought them: rights of files, see linux/landlock.h.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15  # the others are of folders
READ = EXECUTE | READ_FILE | READ_DIR
SCOPES = 3  # from version 6: abstract sockets, signals


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def available() -> int:
    """The version of Landlock in force here, 0 if there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, libc().syscall(CREATE_RULESET, None, 0, VERSION_FLAG))


def confine(read: list[str], write: list[str]) -> bool:
    """Hold this process, and all that it starts, to some folders; False where that cannot be."""
    version = available()
    if not version:
        return False
    handled = sum(bits for since, bits in RIGHTS.items() if since <= version)
    attributes = (ctypes.c_uint64 * 3)(handled, 0, SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = check(libc().syscall(CREATE_RULESET, ctypes.byref(attributes), size, 0))
    for path, rights in [(p, READ) for p in read] + [(p, handled) for p in write]:
        allow(ruleset, path, rights & handled)
    check(libc().prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc().syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return True


def allow(ruleset: int, path: str, rights: int) -> None:
    """One rule; a path that is not there needs none."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rights &= -1 if os.path.isdir(path) else OF_FILES
    rule = rights.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
    try:
        check(libc().syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0))
    finally:
        os.close(place)


def check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def protect_caller() -> None:
    """Keep this process's memory from others of the same user, and become the parent of orphans.

    What a child started in a session of its own can then still be found, see `orphans`.
    """
    if sys.platform.startswith("linux"):
        libc().prctl(NOT_DUMPABLE, 0, 0, 0, 0)
        libc().prctl(SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """The processes whose parent is this one (Linux only)."""
    found = set()
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            if parent == os.getpid():
                found.add(int(name))
    return found


def system_folders() -> list[str]:
    """What a Python process needs to read, besides its own folders."""
    fixed = "/usr /lib /lib64 /bin /sbin /etc /opt /sys /nix /run/opengl-driver".split()
    # not all of /proc: the environment of other processes would be there, tokens and all
    of_proc = "self cpuinfo meminfo stat sys version filesystems devices driver loadavg".split()
    fixed += [f"/proc/{name}" for name in of_proc]
    return [*fixed, sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", action="append", default=[])
    parser.add_argument("--write", action="append", default=[])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    confine([*system_folders(), *args.read], ["/dev", *args.write])
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
