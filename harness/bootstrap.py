"""`./kata`: makes .venv once, then runs the harness in it.

Only the standard library is used here, in words that any Python 3 can read, so that an old one
gets a sentence and not a syntax error.

- What is installed: the dependencies in pyproject.toml, in the versions of constraints.txt, by
  pip, from wherever pip is set up to look (pip.conf, PIP_INDEX_URL, PIP_FIND_LINKS, ...).
- On Linux, pip's usual torch brings several GB of CUDA packages. For the CPU build, let pip know
  of an index or a folder that has it (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS): `2.13.0+cpu`
  satisfies the pin, and pip prefers it.
- Nothing outside the checkout is written, but for pip's own cache of downloads.
- .venv/kata-stamp says what the environment was made for and is written last: without a current
  one the set-up goes on where it stopped. Two runs at once wait for each other.
- KATA_NO_VENV=1 uses the Python that this runs with instead of .venv; it must have everything.

Exit code 3: the set-up failed, and a sentence said why. Otherwise the harness' own.
"""

import os
import sys

NEEDED = (3, 10)
FREE_MB = 1500  # a CPU-only environment takes 1.3 GB
ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
WINDOWS = os.name == "nt"


class Problem(Exception):
    """The set-up cannot go on; the text says why and what to do."""


def main(argv, root=ROOT):
    try:
        if os.environ.get("KATA_NO_VENV") == "1" or is_help(argv):
            check_python()
            if not is_help(argv):
                check_packages(root)
            return run(sys.executable, argv, root, importable=False)
        if not is_current(root):
            prepare(root)
        return run(venv_python(root), argv, root)
    except Problem as problem:
        return fail(str(problem))
    except KeyboardInterrupt:
        return fail("interrupted. What is there is kept: the same command goes on from here.")
    except EnvironmentError as error:
        return fail(explain_os_error(error))


def is_help(argv):
    """Help needs nothing installed."""
    return argv[:1] in (["-h"], ["--help"]) and sys.version_info >= NEEDED


def fail(text):
    sys.stdout.flush()
    sys.stderr.write("kata: %s\n" % text)
    return 3


def run(python, argv, root, importable=True):
    """Become `python -m harness ARGS`; without exec (Windows) its exit code is returned."""
    env = dict(os.environ, KATA_ROOT=root)
    if not importable:
        env["PYTHONPATH"] = os.pathsep.join([root] + [p for p in [env.get("PYTHONPATH")] if p])
    command = [python, "-m", "harness"] + argv
    sys.stdout.flush()
    sys.stderr.flush()
    if not WINDOWS:
        os.execve(python, command, env)
    import subprocess

    child = subprocess.Popen(command, env=env)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child got it too and says the rest
            pass


# ---- what is wanted, and whether it is there ----------------------------------------------------


def venv_python(root):
    path = ["Scripts", "python.exe"] if WINDOWS else ["bin", "python"]
    return os.path.join(root, ".venv", *path)


def stamp_path(root):
    return os.path.join(root, ".venv", "kata-stamp")


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8")
    except EnvironmentError:
        return None


def requirements(root):
    """The strings of `dependencies = [...]` in pyproject.toml, which keeps one a line."""
    found = []
    inside = False
    for line in (read(os.path.join(root, "pyproject.toml")) or "").splitlines():
        line = line.strip()
        if inside and line.startswith("]"):
            break
        if inside and line.startswith('"'):
            found.append(line.split('"')[1])
        inside = inside or line == "dependencies = ["
    return found


def wanted_stamp(root):
    """What the stamp says when the environment is complete."""
    constraints = read(os.path.join(root, "constraints.txt"))
    if constraints is None or not os.path.isfile(os.path.join(root, "pyproject.toml")):
        raise Problem(
            "pyproject.toml and constraints.txt must lie beside kata, in\n"
            "  %s\nThe checkout is not whole: `git status` shows what is missing." % root
        )
    python = os.path.realpath(venv_python(root))
    lines = ["ready", root, python] + requirements(root) + [constraints]
    return "\n".join(lines)


def is_current(root):
    return os.path.exists(venv_python(root)) and read(stamp_path(root)) == wanted_stamp(root)


def write_stamp(root, text):
    temporary = "%s.%d" % (stamp_path(root), os.getpid())
    with open(temporary, "wb") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, stamp_path(root))


def check_python():
    if sys.version_info >= NEEDED:
        return
    text = "Python %d.%d or newer is needed, and this is %d.%d (%s)." % (
        NEEDED + tuple(sys.version_info[:2]) + (sys.executable,)
    )
    other = newer_python()
    if other:
        text += "\nA newer one is here: %s kata ..." % other
    else:
        text += "\nInstall one, then call it by its name: python3.12 kata ..."
    raise Problem(text)


def newer_python():
    """The name of a Python on the PATH that will do, if there is one that answers."""
    import subprocess

    for minor in (12, 13, 11, 10, 14):
        name = "python3.%d" % minor
        try:
            with open(os.devnull, "w") as null:
                if subprocess.call([name, "-c", ""], stdout=null, stderr=null) == 0:
                    return name
        except EnvironmentError:
            pass
    return None


def check_modules():
    """`venv` and `ensurepip` are separate packages on Debian and its kin."""
    import importlib.util

    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise Problem(
            "this Python (%s) cannot make environments: its module %s is missing.\n"
            "On Debian and Ubuntu: sudo apt install python%d.%d-venv. Elsewhere: a Python that is "
            "whole,\nas from python.org, called by its name: python3.12 kata ..."
            % ((sys.executable, " and ".join(missing)) + tuple(sys.version_info[:2]))
        )


def check_packages(root):
    """With KATA_NO_VENV: everything must be there already."""
    from importlib import metadata

    missing = []
    for requirement in requirements(root):
        name, _, marker = requirement.partition(";")
        name = name.split(">")[0].split("=")[0].strip()
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            if not marker:
                missing.append(name)
    if missing:
        raise Problem(
            "KATA_NO_VENV=1 asks for this Python (%s), which lacks %s.\n"
            "Without it ./kata makes an environment of its own, .venv."
            % (sys.executable, ", ".join(missing))
        )


# ---- setting up ---------------------------------------------------------------------------------


def prepare(root):
    """Make the environment, or complete it; one run at a time."""
    import time

    check_python()
    check_modules()
    started = time.time()
    state = os.path.join(root, ".kata")
    if not os.path.isdir(state):
        os.makedirs(state)
    on_terminate()
    lock = take_lock(os.path.join(state, "setup.lock"))
    try:
        if is_current(root):  # another run has done it
            return
        say("Setting up .venv with Python %d.%d.%d. This is done once." % sys.version_info[:3])
        say("[1/3] the environment")
        make_environment(root)
        write_stamp(root, "unfinished\n%s\n" % root)
        say("[2/3] the packages (pip's own words: .kata/setup.log)")
        install(root, os.path.join(state, "setup.log"), lock)
        say("[3/3] the links to this checkout")
        link_checkout(root)
        register_merge_driver(root)
        write_stamp(root, wanted_stamp(root))
        say("Ready after %s.\n" % duration(time.time() - started))
    finally:
        lock.close()


def on_terminate():
    """A polite kill ends like Ctrl-C: pip is stopped too, and a sentence is said."""
    import signal

    def interrupt(*ignored):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def say(text):
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def duration(seconds):
    return "%d s" % seconds if seconds < 100 else "%d min %02d s" % divmod(int(seconds), 60)


def take_lock(path):
    """An open file that is locked until it is closed, by this process and by its children."""
    import time

    lock = open(path, "a+b")
    waiting = 0
    while not try_lock(lock):
        if waiting % 150 == 0:
            say("Another run of kata is setting up .venv; waiting for it.")
        waiting += 1
        time.sleep(0.2)
    return lock


def try_lock(lock):
    try:
        if WINDOWS:
            import msvcrt

            lock.seek(0)
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except EnvironmentError as error:
        import errno

        # A file system without locks (some network drives): go on without one.
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


def make_environment(root):
    """A .venv whose Python runs and has pip, kept if there is a good one."""
    import shutil

    venv = os.path.join(root, ".venv")
    if os.path.lexists(venv):
        unfit = what_is_wrong(root)
        if unfit is None:
            remove_half_installed(root)
            return
        if os.path.islink(venv) or not os.path.isdir(venv):
            raise Problem(
                "%s cannot be used: %s.\nIt is not a folder of its own, so it is left alone: "
                "remove it, and run the same command again." % (venv, unfit)
            )
        say("      the one that is there cannot be used (%s): made anew" % unfit)
        shutil.rmtree(venv)
    free = shutil.disk_usage(root).free // 2**20
    if free < FREE_MB:
        raise Problem(full_disk("%d MB are free there, and %d are needed" % (free, FREE_MB)))
    code, output = capture([sys.executable, "-I", "-m", "venv", venv])
    if code != 0:
        raise Problem(
            explain(output)
            or "Python's venv module failed:\n%s" % indent(output.splitlines()[-5:])
        )


def what_is_wrong(root):
    """Why the .venv that is there cannot be completed; None if it can. Says what it is."""
    stamp = (read(stamp_path(root)) or "").split("\n")
    if stamp[0] in ("ready", "unfinished") and stamp[1:2] != [root]:
        return "it was made in another folder, %s" % "".join(stamp[1:2])
    code, output = capture(
        [venv_python(root), "-I", "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"]
    )
    version = output.strip().splitlines()[-1:] or [""]
    if code != 0:
        return "it has no pip" if "No module named" in output else "its Python does not run"
    if tuple(int(part) for part in version[0].split(".")) < NEEDED:
        return "its Python is %s, and %d.%d is needed" % ((version[0],) + NEEDED)
    if stamp[0] == "unfinished":
        say("      an earlier set-up did not finish: going on where it stopped")
    elif stamp[0] == "ready":
        say("      it is not up to date with constraints.txt: completing it")
    else:
        say("      there is one that ./kata did not make: completing it")
    return None


def capture(command):
    """Exit code and what the command wrote; code -1 if it cannot be started."""
    import subprocess

    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except EnvironmentError as error:
        return -1, str(error)
    try:
        output = child.communicate()[0]
    except KeyboardInterrupt:
        stop(child)
        raise
    return child.returncode, output.decode("utf-8", "replace")


def site_packages(root):
    venv = os.path.join(root, ".venv")
    if WINDOWS:
        return [os.path.join(venv, "Lib", "site-packages")]
    import glob

    return glob.glob(os.path.join(glob.escape(venv), "lib", "python3*", "site-packages"))


def remove_half_installed(root):
    """Let pip install again what it was killed in the middle of.

    pip writes a package's INSTALLER after its files, but counts it as installed as soon as its
    metadata lies there.
    """
    import shutil

    for folder in site_packages(root):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            half = name.endswith(".dist-info") and not os.path.exists(
                os.path.join(path, "INSTALLER")
            )
            if half or name.startswith("~"):
                shutil.rmtree(path, ignore_errors=True)


def link_checkout(root):
    """`python -m harness` and the command `kata` of the environment find this checkout."""
    for folder in site_packages(root):
        with open(os.path.join(folder, "recsys-katas.pth"), "w") as file:
            file.write(root + "\n")
    scripts = os.path.dirname(venv_python(root))
    if WINDOWS:
        with open(os.path.join(scripts, "kata.bat"), "w") as file:
            file.write('@"%~dp0python.exe" -m harness %*\n')
        return
    script = os.path.join(scripts, "kata")
    with open(script, "w") as file:
        file.write('#!/bin/sh\nexec "$(dirname "$0")/python" -m harness "$@"\n')
    os.chmod(script, 0o755)


def register_merge_driver(root):
    """git keeps the learner's files when a newer version is pulled: see harness/merge.py."""
    import subprocess

    if not os.path.exists(os.path.join(root, ".git")):
        return  # a checkout without its history cannot pull
    python = os.path.relpath(venv_python(root), root).replace(os.sep, "/")
    driver = "%s harness/merge.py %%O %%A %%B %%P" % python
    try:
        subprocess.call(["git", "-C", root, "config", "merge.kata.driver", driver])
    except OSError:
        pass  # no git here; whoever pulls somewhere else sets up there


# ---- pip ----------------------------------------------------------------------------------------


def install(root, log_path, lock):
    """Run pip, showing a line for each package that it takes."""
    import subprocess

    command = [venv_python(root), "-I", "-u", "-m", "pip", "install", "--no-user"]
    command += ["--only-binary", ":all:", "-c", os.path.join(root, "constraints.txt")]
    env = dict(
        os.environ,
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PIP_NO_INPUT="1",
        PIP_PROGRESS_BAR="off",
        NO_COLOR="1",
    )
    # These would send the packages elsewhere, or leave some out.
    for name in ("USER", "TARGET", "PREFIX", "ROOT", "DRY_RUN", "NO_DEPS", "QUIET", "LOG"):
        env.pop("PIP_" + name, None)
    keep = {} if WINDOWS else {"pass_fds": [lock.fileno()]}  # pip holds the lock until it ends
    child = subprocess.Popen(
        command + requirements(root),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **keep
    )
    try:
        output = follow(child, log_path, root)
    except BaseException:
        stop(child)
        raise
    if child.wait() != 0:
        raise Problem(
            explain(output)
            or "pip failed with exit code %d. Its last words:\n%s\nAll of them: %s"
            % (child.returncode, indent(output.splitlines()[-5:]), log_path)
        )


def stop(child):
    """End a child that may be in the middle of something; wait until it has."""
    import subprocess

    try:
        child.terminate()
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def follow(child, log_path, root):
    """Show pip's progress, keep its words in the log; all that it wrote."""
    import queue
    import threading

    lines = queue.Queue()

    def reader():
        for line in iter(child.stdout.readline, b""):
            lines.put(line)
        lines.put(None)

    threading.Thread(target=reader, daemon=True).start()
    progress = Progress(root)
    output = []
    with open(log_path, "wb") as log:
        while True:
            try:
                line = lines.get(timeout=0.5)
            except queue.Empty:
                progress.alive()
                continue
            if line is None:
                progress.clear()
                return "".join(output)
            log.write(line)
            log.flush()
            output.append(line.decode("utf-8", "replace"))
            progress.take(output[-1])


class Progress:
    """A line for each package; in between, that it lives and for how long."""

    def __init__(self, root):
        import time

        self.now = time.time
        self.root = root
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.doing = "asking the package index"
        self.since = self.said = self.now()
        self.seen = set()
        self.total = self.before = 0

    def take(self, line):
        """Make what it means of one line of pip's."""
        words = line.split()
        if words[:1] in (["Downloading"], ["Processing"]) or words[:2] == ["Using", "cached"]:
            wheel = [word for word in words if ".whl" in word and ".metadata" not in word]
            if wheel:
                self.package(os.path.basename(wheel[0]), words)
        elif line.startswith("Installing collected packages:"):
            self.total, self.before = line.count(",") + 1, self.installed()
            self.start("installing %d packages" % self.total, show=True)
        elif "Retrying (" in line and "retry" not in self.seen:
            self.seen.add("retry")
            self.start("the package index does not answer; trying again", show=True)

    def package(self, wheel, words):
        name, version = (wheel.split("-") + [""])[:2]
        if name in self.seen:
            return
        self.seen.add(name)
        size = ""
        if words[-1].endswith("B)"):
            size = " ".join(words[-2:]).strip("()")
        where = "" if words[0] == "Downloading" else " (on disk)"
        text = "%s %s%s" % (name, version, where)
        self.start("%-40s%s" % (text, size), show=True)

    def start(self, doing, show=False):
        self.doing, self.since = doing.rstrip(), self.now()
        if show:
            self.clear()
            say("      " + self.doing)
            self.said = self.now()

    def alive(self):
        """Called about twice a second while pip is silent."""
        doing = self.doing
        if self.total:
            done = min(max(0, self.installed() - self.before), self.total)
            doing = "installed %d of %d packages" % (done, self.total)
        text = "%s ... %s" % (" ".join(doing.split()), duration(self.now() - self.since))
        if self.live:
            sys.stderr.write("\r\033[K      %s" % text[:72])
            sys.stderr.flush()
        elif self.now() - self.said > 15:
            say("      " + text)
            self.said = self.now()

    def installed(self):
        """How many packages lie there whole."""
        import glob

        pattern = os.path.join("*.dist-info", "INSTALLER")
        return sum(
            len(glob.glob(os.path.join(glob.escape(folder), pattern)))
            for folder in site_packages(self.root)
        )

    def clear(self):
        if self.live:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


# ---- what went wrong, in words ------------------------------------------------------------------

NETWORK = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "Read timed out",
    "Connection refused",
    "Connection reset",
    "Network is unreachable",
    "name resolution",
    "getaddrinfo failed",
    "nodename nor servname",
    "Max retries exceeded",
    "ProxyError",
    "RemoteDisconnected",
    "IncompleteRead",
)


def explain(output):
    """A sentence for what pip or venv wrote, or None if it is none of the known troubles."""
    import re

    def has(*parts):
        return any(part in output for part in parts)

    if has("No space left on device", "not enough space on the disk", "Disk quota exceeded"):
        return full_disk("nothing more can be written")
    if has("CERTIFICATE_VERIFY_FAILED", "SSLError"):
        return (
            "the package index cannot be trusted: its certificate is not known here.\nBehind a "
            "company's proxy, let pip know of the proxy's: PIP_CERT=/path/to/certificates.pem"
        )
    if has(*NETWORK):
        return (
            "the package index cannot be reached.\nIs there a network? Behind a proxy set "
            "HTTPS_PROXY. Without a network, point pip to a folder of wheels:\nPIP_NO_INDEX=1 "
            "PIP_FIND_LINKS=/path/to/wheels. The same command then goes on from here."
        )
    if has("Permission denied", "Read-only file system"):
        return no_permission(ROOT)
    if has("ensurepip is not"):
        return "this Python has no ensurepip: on Debian and Ubuntu, sudo apt install python3-venv"
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if not missing and "depends on" not in output:
        missing = re.search(r"The user requested \(constraint\) (\S+)", output)
    if missing:
        import platform

        return (
            "pip finds no build of %s for Python %d.%d on %s %s.\nPython 3.10 to 3.13 on 64-bit "
            "Linux, Windows or an ARM Mac have them all: python3.12 kata ..."
            % (
                (missing.group(1),)
                + tuple(sys.version_info[:2])
                + (platform.system(), platform.machine())
            )
        )
    return None


def explain_os_error(error):
    import errno

    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return full_disk("nothing more can be written")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return no_permission(error.filename or ROOT)
    return "the set-up cannot go on: %s" % error


def full_disk(detail):
    import tempfile

    return (
        "the disk is full: %s.\nMake room in %s or in the folder for temporary files (%s), then "
        "run the same command again: it goes on from here." % (detail, ROOT, tempfile.gettempdir())
    )


def no_permission(path):
    return "%s may not be written. Is the checkout yours, and not read-only?" % path


def indent(lines):
    return "\n".join("  " + line for line in lines)
