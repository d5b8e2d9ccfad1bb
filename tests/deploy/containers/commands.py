"""Each command line of refarch in what is shipped is one that refarch takes. REFARCH names the executable."""

import functools
import glob
import os
import subprocess
import unittest

import command_lines
from facts import ROOT, Checks, read

# Where command lines are.
FILES = (
    "Dockerfile",
    "config/aws/Dockerfile",
    "config/aws/refarch.yaml",
    "config/compose.yaml",
    "tests/deploy/containers/fleet.py",
)
FOLDERS = ("*.md", "docs/*.md", "config/kubernetes/**/*.yaml", "scripts/*")

# Command lines for which scripts/deploy-aws prints what its tasks run.
DEPLOYMENTS = (
    ["up", "--image", "v1", "--rebuild"],
    ["up", "--image", "v1", "--set", "CertificateArn=arn:aws:acm:made-up"],
    ["load", "10"],
    ["psql", "--", "-c", "SELECT 1"],
    ["run", "--", "verify"],
)


def files():
    found = {
        os.path.relpath(path, ROOT)
        for folder in FOLDERS
        for path in glob.glob(os.path.join(ROOT, folder), recursive=True)
        if os.path.isfile(path)
    }
    # What was changed is told of earlier versions.
    return sorted((found | set(FILES)) - {"CHANGELOG.md"})


@functools.lru_cache(maxsize=None)
def fault(args):
    """Why refarch does not take these arguments. Nothing is run: --help comes last."""
    # psql gets what follows, --help too.
    args = args[: args.index("psql") + 1] if "psql" in args else args
    done = subprocess.run([os.environ["REFARCH"], *args, "--help"], capture_output=True, text=True, check=False)
    return done.stderr.partition("\n\nUsage:")[0] if done.returncode != 0 else None


def check(texts):
    """Checks the command lines in texts, a dictionary of paths."""
    checks = Checks()
    for path, text in texts.items():
        for args in command_lines.of(path, text):
            refused = fault(tuple(args))
            checks.that(refused is None, "%s: refarch %s: %s" % (path, " ".join(args), refused))
    return checks


def check_deployments(texts):
    """Checks what the tasks on AWS run, as a dry run prints it; and the calls of the script in the pages."""
    checks = Checks()
    with command_lines.deployment(texts) as deploy:
        for args in DEPLOYMENTS:
            said = deploy(args)
            if checks.that(said.returncode == 0, "deploy-aws %s: %s" % (" ".join(args), said.stderr)):
                found = list(command_lines.of("said.sh", said.stdout))
                checks.that(found, "deploy-aws %s runs nothing" % " ".join(args))
                checks.faults += check({"said.sh": said.stdout}).faults
        for path, text in texts.items():
            if path.endswith(".md"):
                for args in command_lines.deployments(text):
                    said = deploy(args)
                    checks.that(
                        said.returncode == 0, "%s: deploy-aws %s: %s" % (path, " ".join(args), said.stderr)
                    )
    return checks


# What is replaced by what in a file.
MISTAKES = {
    "a role that does not exist": ("Dockerfile", 'CMD ["up"]', 'CMD ["upp"]'),
    "a flag of a health check": ("config/compose.yaml", '"health", "--ready"]', '"health", "--redy"]'),
    "a role of a service": ("config/compose.yaml", 'command: ["listen"]', 'command: ["lisen"]'),
    "the migration of a fleet": ("config/compose.yaml", "migrate --roles", "migrate --rolls"),
    "the migration of a cluster": ("config/kubernetes/base/migrate.yaml", "migrate --roles", "migrate --rolls"),
    "a tool of the fleet": ("tests/deploy/containers/fleet.py", '"verify", "--json"', '"verify", "--jsn"'),
    "an argument of a pod": ("config/kubernetes/base/embed.yaml", 'args: ["embed"]', 'args: ["embed", "--wrokers=2"]'),
    "a task on AWS": ("config/aws/refarch.yaml", "Command: [listen]", "Command: [listen, --until-idel]"),
    "a health check on AWS": ("config/aws/refarch.yaml", "[CMD, refarch, health]", "[CMD, refarch, helth]"),
    "a shell on AWS": ("config/aws/refarch.yaml", "[exec refarch status]", "[exec refarch status --josn]"),
    "a flag of a page": ("docs/runbook.md", "redrive --all --dry-run", "redrive --all --dryrun"),
    "a command in a sentence": ("docs/runbook.md", "`refarch plan --records 1e6`", "`refarch plan --recrods 1e6`"),
    "a value": ("docs/plan.md", "embed --workers 2", "embed --workers two"),
    "a release's pages": ("scripts/release", "refarch man --dir", "refarch man --folder"),
}
DEPLOYMENT_MISTAKES = {
    "a flag of a task": ("scripts/deploy-aws", "refarch migrate$rebuild --roles", "refarch migrate$rebuild --rolls"),
    "a part of the fleet": ("scripts/deploy-aws", "grants+=,edit=", "grants+=,edits="),
    "a load": ("scripts/deploy-aws", "--count $count --load", "--cuont $count --load"),
    "an option of the script": ("docs/runbook.md", "up --rebuild ", "up --rebuilt "),
    "a parameter of the template": ("docs/runbook.md", "--set EmbedMin=10", "--set EmbedMinimum=10"),
}


class Commands(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.texts = {path: read(path) for path in files()}

    def test_refarch_takes_every_command_line(self):
        checks = check(self.texts)
        self.assertEqual(checks.faults, [])
        self.assertGreater(checks.count, 100)
        lines = {path: len(list(command_lines.of(path, text))) for path, text in self.texts.items()}
        for path in (*FILES, "docs/runbook.md", "docs/containers.md", "scripts/release"):
            # The image for AWS runs nothing of its own.
            self.assertTrue(lines[path] or path == "config/aws/Dockerfile", path)
        print("commands: %d command lines in %d files" % (checks.count, sum(map(bool, lines.values()))))

    def test_refarch_takes_what_the_tasks_on_aws_run(self):
        checks = check_deployments(self.texts)
        self.assertEqual(checks.faults, [])
        print("commands: %d assertions about scripts/deploy-aws" % checks.count)

    def test_mistakes_are_found(self):
        for mistakes, find in ((MISTAKES, check), (DEPLOYMENT_MISTAKES, check_deployments)):
            for name, (path, right, wrong) in mistakes.items():
                with self.subTest(name):
                    self.assertIn(right, self.texts[path])
                    spoiled = {path: self.texts[path].replace(right, wrong)}
                    if find is check_deployments:
                        spoiled = {"scripts/deploy-aws": self.texts["scripts/deploy-aws"], **spoiled}
                    self.assertNotEqual(find(spoiled).faults, [])
        print("commands: %d mistakes planted, all found" % (len(MISTAKES) + len(DEPLOYMENT_MISTAKES)))


if __name__ == "__main__":
    unittest.main()
