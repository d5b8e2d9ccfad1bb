"""cfn-lint and checkov have nothing to say. CHECKOV names its executable, which has an environment of its own."""

import os
import pathlib
import re
import subprocess
import sys
import unittest

from template import AWS, ROOT

BIN = pathlib.Path(sys.executable).parent


def run(*command, **env):
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **env})


class Lints(unittest.TestCase):
    def test_cfn_lint(self):
        result = run(BIN / "cfn-lint", AWS / "refarch.yaml")
        self.assertEqual((result.returncode, result.stdout), (0, ""), result.stderr)

    def test_checkov(self):
        command = (os.environ["CHECKOV"], "--config-file", AWS / "checkov.yaml", "--file", AWS / "refarch.yaml")
        result = run(*command, LOG_LEVEL="CRITICAL")
        summary = re.search(r"Passed checks: (\d+), Failed checks: (\d+)", result.stdout)
        self.assertTrue(summary, result.stdout + result.stderr)
        print(f"checkov: {summary.group(0)}")
        self.assertEqual((result.returncode, summary.group(2)), (0, "0"), result.stdout)
        self.assertGreater(int(summary.group(1)), 80)

    def test_what_checkov_passes_over_has_a_reason(self):
        """Each comes after a comment, and names what it is; and each is needed, or it would hide a later fault."""
        text = (AWS / "checkov.yaml").read_text().split("skip-check:\n")[1]
        reason = False
        for line in text.splitlines():
            if line.lstrip().startswith("#"):
                reason = True
            else:
                self.assertRegex(line, r"^  - CKV\d?_AWS_\d+ # .+")
                self.assertTrue(reason, line)
        skipped = set(re.findall(r"CKV\w+", text))
        command = (os.environ["CHECKOV"], "--file", AWS / "refarch.yaml", "--framework", "cloudformation", "--skip-download",
                   "--compact", "--quiet")  # fmt: skip
        found = set(re.findall(r"Check: (CKV\w+)", run(*command, LOG_LEVEL="CRITICAL").stdout))
        self.assertEqual(skipped, found)


if __name__ == "__main__":
    unittest.main()
