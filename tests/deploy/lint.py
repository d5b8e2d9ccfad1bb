"""The linters of image and workflows, and what they do not know."""

import glob
import os
import re
import subprocess
import sys
import unittest

import facts
from facts import INSTRUCTIONS, ROOT, Checks, read

BIN = os.path.dirname(sys.executable)


def linted(tool, *args):
    done = subprocess.run([os.path.join(BIN, tool), *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout.decode()


def check_image(instructions, dockerfile):
    checks = Checks()
    rust = re.search(r'^rust-version = "(.*)"', read("Cargo.toml"), re.M).group(1)
    checks.that("RUST_IMAGE=rust:%s-bookworm" % rust in instructions["ARG"], "the builder is not Rust %s" % rust)
    checks.that("RUNTIME_IMAGE=debian:bookworm-slim" in instructions["ARG"], "the runtime is not that of the builder")
    checks.that(instructions["USER"] == ["10001:10001"], "the user is not given by number, or is root")
    checks.that(instructions["STOPSIGNAL"] == ["SIGTERM"], "another signal to stop")
    health = " ".join(instructions["HEALTHCHECK"])
    checks.that(health.endswith('CMD ["refarch", "health"]') and "health" in facts.commands(), "the health check is not the binary's")
    checks.that(instructions["CMD"] == ['["up"]'] and "refarch" in instructions["ENTRYPOINT"][0], "the role is not the argument")
    ports = set(instructions["EXPOSE"][0].split())
    checks.that(ports == {str(facts.PAGE_PORT), str(facts.ADMIN_PORT)}, "the ports are not those of the addresses")
    for variable in facts.IMAGE_ENV:
        checks.that(facts.is_known_variable(variable), "there is no variable %s" % variable)
    for label in ("title", "description", "licenses", "version", "revision"):
        checks.that("org.opencontainers.image.%s=" % label in instructions["LABEL"][0], "no label %s" % label)
    checks.that("ADD" not in instructions and "curl" not in dockerfile, "something is fetched without a hash")
    version = re.search(r'^version = "(.*)"', read("Cargo.toml"), re.M).group(1)
    checks.that("VERSION=%s" % version in instructions["ARG"], "the image has another version than the crate")
    checks.that("newTag: %s\n" % version in read("config/kubernetes/base/kustomization.yaml"), "the manifests have another version than the crate")
    # What is copied must be let in.
    let_in = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    for copied in instructions["COPY"]:
        for source in [] if copied.startswith("--from") else copied.split()[:-1]:
            checks.that(any(source == path or source.startswith(path + "/") for path in let_in), "%s is not let in" % source)
    return checks


def check_workflows(texts):
    checks = Checks()
    for name, text in texts.items():
        checks.that(re.search(r"^permissions:\n  contents: read\n", text, re.M), "%s: too many rights at first" % name)
        for job in re.findall(r"^  ([\w-]+):\n(?:    .*\n|\n)+", text[text.index("\njobs:") :], re.M):
            checks.that(re.search(r"^  %s:\n(?:    .*\n|\n)*?    timeout-minutes: " % job, text, re.M), "%s: %s has no time limit" % (name, job))
        for action in re.findall(r"uses: (\S+)", text):
            checks.that(re.fullmatch(r"(actions|docker)/[\w-]+(/[\w-]+)*@v\d+", action), "%s: %s is nobody we know" % (name, action))
        for line in re.findall(r"\$\{\{ ?github\.event\S*", text):
            checks.that(False, "%s: %s comes from outside" % (name, line))
    return checks


class Lint(unittest.TestCase):
    def test_the_image(self):
        code, output = linted("hadolint", "Dockerfile")
        self.assertEqual((code, output), (0, ""))
        checks = check_image(INSTRUCTIONS, read("Dockerfile"))
        self.assertEqual(checks.faults, [])
        print("image: hadolint is content, %d assertions" % checks.count)

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
