"""The linters of images, scripts and workflows, and what they do not know."""

import glob
import os
import re
import subprocess
import sys
import unittest

import facts
from facts import ROOT, Checks, read

BIN = os.path.dirname(sys.executable)


def linted(tool, *args):
    done = subprocess.run(
        [os.path.join(BIN, tool), *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout.decode()


def dockerfiles():
    """Every Dockerfile that is shipped or tested with."""
    found = ("Dockerfile", "config/**/Dockerfile*", "tests/deploy/**/Dockerfile*")
    return sorted(path for pattern in found for path in glob.glob(pattern, root_dir=ROOT, recursive=True))


def scripts():
    """Every file that a shell runs or sources."""
    found = []
    for folder in ("scripts", "config", "tests", ".ci"):
        for path in glob.glob(os.path.join(folder, "**"), root_dir=ROOT, recursive=True):
            if os.path.isfile(os.path.join(ROOT, path)):
                with open(os.path.join(ROOT, path), "rb") as file:
                    first = file.readline()
                if re.match(rb"#!.*\b(ba|da)?sh\b|# shellcheck shell=", first):
                    found.append(path)
    return sorted(found)


def check_image(dockerfile):
    checks = Checks()
    instructions, variables = facts.image(dockerfile)
    rust = re.search(r'^rust-version = "(.*)"', read("Cargo.toml"), re.M).group(1)
    checks.that(
        "RUST_IMAGE=rust:%s-bookworm" % rust in instructions["ARG"], "the builder is not Rust %s" % rust
    )
    checks.that(
        "RUNTIME_IMAGE=debian:bookworm-slim" in instructions["ARG"], "the runtime is not that of the builder"
    )
    checks.that(instructions["USER"] == ["10001:10001"], "the user is not given by number, or is root")
    checks.that(instructions["STOPSIGNAL"] == ["SIGTERM"], "another signal to stop")
    health = " ".join(instructions["HEALTHCHECK"])
    checks.that(
        health.endswith('CMD ["refarch", "health"]') and "health" in facts.commands(),
        "the health check is not the binary's",
    )
    checks.that(
        instructions["CMD"] == ['["up"]'] and "refarch" in instructions["ENTRYPOINT"][0],
        "the role is not the argument",
    )
    ports = {
        variables[name].rpartition(":")[2]
        for name in ("REFARCH_SERVE_BIND", "REFARCH_ADMIN_LISTEN")
        if name in variables
    }
    checks.that(ports == set(instructions["EXPOSE"][0].split()), "the ports are not those of the addresses")
    for variable in variables:
        checks.that(facts.is_known_variable(variable), "there is no variable %s" % variable)
    for label in ("title", "description", "licenses", "version", "revision"):
        checks.that("org.opencontainers.image.%s=" % label in instructions["LABEL"][0], "no label %s" % label)
    checks.that("ADD" not in instructions and "curl" not in dockerfile, "something is fetched without a hash")
    version = re.search(r'^version = "(.*)"', read("Cargo.toml"), re.M).group(1)
    checks.that("VERSION=%s" % version in instructions["ARG"], "the image has another version than the crate")
    checks.that(
        "newTag: %s\n" % version in read("config/kubernetes/base/kustomization.yaml"),
        "the manifests have another version than the crate",
    )
    # What is copied must be let in.
    let_in = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    for copied in instructions["COPY"]:
        for source in [] if copied.startswith("--from") else copied.split()[:-1]:
            checks.that(
                any(source == path or source.startswith(path + "/") for path in let_in),
                "%s is not let in" % source,
            )
    return checks


def check_sources(dockerfile):
    """What the sources have built in must be copied for the builder."""
    checks = Checks()
    stages = re.split(r"^FROM ", dockerfile, flags=re.M)
    (builder,) = [stage for stage in stages if stage.partition("\n")[0].endswith("AS builder")]
    copied = [path for line in re.findall(r"^COPY (?!--from)(.*) \S+$", builder, re.M) for path in line.split()]
    for source in glob.glob("src/**/*.rs", root_dir=ROOT, recursive=True):
        program = re.split(r"#\[cfg\(test\)\]\s+mod \w+ \{|#\[test\]", read(source))[0]
        for included in re.findall(r'include_(?:str|bytes)!\("([^"]+)"\)', program):
            path = os.path.normpath(os.path.join(os.path.dirname(source), included))
            checks.that(
                any(path == known or path.startswith(known + "/") for known in copied),
                "%s has %s built in, which is not copied" % (source, path),
            )
    return checks


def check_workflows(texts):
    checks = Checks()
    for name, text in texts.items():
        checks.that(
            re.search(r"^permissions:\n  contents: read\n", text, re.M), "%s: too many rights at first" % name
        )
        for job in re.findall(r"^  ([\w-]+):\n(?:    .*\n|\n)+", text[text.index("\njobs:") :], re.M):
            checks.that(
                re.search(r"^  %s:\n(?:    .*\n|\n)*?    timeout-minutes: " % job, text, re.M),
                "%s: %s has no time limit" % (name, job),
            )
        for action in re.findall(r"uses: (\S+)", text):
            checks.that(
                re.fullmatch(r"(actions|docker)/[\w-]+(/[\w-]+)*@v\d+", action),
                "%s: %s is nobody we know" % (name, action),
            )
        for line in re.findall(r"\$\{\{ ?github\.event\S*", text):
            checks.that(False, "%s: %s comes from outside" % (name, line))
    return checks


# What is replaced by what, and the fault that has to be found.
IMAGE_MISTAKES = {
    "root": ("USER 10001:10001", "USER root", "is root"),
    "a health check that needs a program": (
        '"refarch", "health"]',
        '"wget", "localhost"]',
        "not the binary's",
    ),
    "a signal that kills": ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "another signal"),
    "a port that nobody listens at": ("EXPOSE 3000 9464", "EXPOSE 3000 9465", "not those of the addresses"),
    "a setting that does not exist": (
        "REFARCH_SERVE_BIND=",
        "REFARCH_SERVE_BNID=",
        "no variable REFARCH_SERVE_BNID",
    ),
    "another Rust": ("RUST_IMAGE=rust:1.95", "RUST_IMAGE=rust:1.80", "the builder is not Rust"),
    "an older system at run time": (
        "RUNTIME_IMAGE=debian:bookworm",
        "RUNTIME_IMAGE=debian:bullseye",
        "not that of the builder",
    ),
    "a file that is not let in": ("COPY src src", "COPY docs docs", "docs is not let in"),
    "no licence": ("image.licenses", "image.license", "no label licenses"),
    "another version": ("VERSION=0.1.0", "VERSION=0.0.9", "another version than the crate"),
    "a download without a hash": (
        "WORKDIR /refarch\n",
        "ADD http://localhost/model /refarch\n",
        "without a hash",
    ),
    "a role that cannot be chosen": ('CMD ["up"]', 'CMD ["serve"]', "not the argument"),
}
SOURCE_MISTAKES = {
    "a file that is built in and not copied": (
        " config/runtime.json config/\nCOPY src",
        " config/\nCOPY src",
        "runtime.json built in",
    ),
    "only some of the sources": ("COPY src src", "COPY src/role src/role", "schema/0001_core.sql built in"),
}
WORKFLOW_MISTAKES = {
    "rights for every job": (
        "permissions:\n  contents: read\n\n",
        "permissions: write-all\n\n",
        "too many rights",
    ),
    "an action of somebody": ("docker/login-action@v4", "somebody/login@main", "nobody we know"),
    "a job without an end": ("    timeout-minutes: 30\n", "", "publish has no time limit"),
    "a text from outside": (
        "${{ github.token }}",
        "${{ github.event.head_commit.message }}",
        "comes from outside",
    ),
}


class Lint(unittest.TestCase):
    def planted(self, text, mistakes, check):
        for name, (right, wrong, fault) in mistakes.items():
            with self.subTest(name):
                self.assertIn(right, text)
                faults = check(text.replace(right, wrong)).faults
                self.assertTrue(any(fault in found for found in faults), faults)

    def test_mistakes_are_found(self):
        self.planted(read("Dockerfile"), IMAGE_MISTAKES, check_image)
        self.planted(read("Dockerfile"), SOURCE_MISTAKES, check_sources)
        release = read(".github/workflows/release.yml")
        self.planted(release, WORKFLOW_MISTAKES, lambda text: check_workflows({"release.yml": text}))
        print(
            "image: %d, workflows: %d mistakes planted, all found"
            % (len(IMAGE_MISTAKES) + len(SOURCE_MISTAKES), len(WORKFLOW_MISTAKES))
        )

    def test_the_image(self):
        paths = dockerfiles()
        self.assertLess({"Dockerfile", "config/aws/Dockerfile"}, set(paths))
        code, output = linted("hadolint", *paths)
        self.assertEqual((code, output), (0, ""))
        checks = check_image(read("Dockerfile"))
        self.assertEqual(checks.faults, [])
        sources = check_sources(read("Dockerfile"))
        self.assertEqual(sources.faults, [])
        self.assertGreater(sources.count, 15)
        print("images: hadolint is content with %d; %d assertions" % (len(paths), checks.count + sources.count))

    def test_the_scripts(self):
        paths = scripts()
        self.assertLess(
            {"scripts/deploy-aws", "scripts/deploy-aws-calls.bash", "scripts/release", "scripts/setup"}, set(paths)
        )
        code, output = linted("shellcheck", "--external-sources", *paths)
        self.assertEqual((code, output), (0, ""))
        print("scripts: shellcheck is content with %d" % len(paths))

    def test_the_workflows(self):
        paths = sorted(glob.glob(os.path.join(ROOT, ".github/workflows/*.yml")))
        self.assertTrue(paths)
        code, output = linted("actionlint", "-no-color", "-shellcheck=", "-pyflakes=", *paths)
        self.assertEqual((code, output), (0, ""))
        checks = check_workflows({os.path.basename(path): read(path) for path in paths})
        self.assertEqual(checks.faults, [])
        print("workflows: actionlint is content, %d assertions" % checks.count)


if __name__ == "__main__":
    unittest.main()
