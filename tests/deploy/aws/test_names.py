"""Each variable that a task gets is one that refarch reads. REFARCH names the executable."""

import os
import pathlib
import re
import subprocess
import tempfile
import unittest

from template import ROOT, containers, environment, load, parameter_sets, reference, secrets


def config(variables):
    """What refarch config says with these variables alone."""
    with tempfile.TemporaryDirectory() as empty:
        return subprocess.run(
            [os.environ["REFARCH"], "config"],
            env={"PATH": os.environ["PATH"], "HOME": empty, **variables},
            cwd=empty,
            capture_output=True,
            text=True,
            check=False,
        )


class Names(unittest.TestCase):
    def values(self, container):
        """A container's variables, with what their references may resolve to."""
        parameters = parameter_sets(load())["defaults"]
        pinecone = {"PineconeIndex": "shop"}
        values = {}
        for name, value in {**environment(container), **secrets(container)}.items():
            target = reference(value)
            if isinstance(value, dict):
                queue = f"https://sqs.us-east-1.amazonaws.com/123456789012/{target}"
                value = pinecone.get(target) or parameters.get(target) or (queue if target.endswith("Queue") else "made-up")
            values[name] = str(value)
        return values

    def test_refarch_takes_every_variable(self):
        sources = "\n".join(path.read_text() for path in (ROOT / "src" / "config").glob("*.rs"))
        roles = (ROOT / "config" / "roles.sql").read_text()
        named = 0
        for name, _, container in containers(load()):
            values = self.values(container)
            answer = config(values)
            self.assertEqual(answer.returncode, 0, f"{name}: {answer.stderr}")
            for variable, value in values.items():
                with self.subTest(task=name, variable=variable):
                    named += 1
                    if variable.startswith("REFARCH_"):
                        section, key = variable.removeprefix("REFARCH_").lower().split("_", 1)
                        part = re.search(rf"^\[{section}\]$(.*?)(?=^\[|\Z)", answer.stdout, re.M | re.S).group(1)
                        line = re.search(rf"^{key} = (.*)$", part, re.M)
                        self.assertTrue(line, f"there is no setting {section}.{key}")
                        if variable != "REFARCH_SERVE_EDIT_TOKEN":
                            self.assertIn(value, line.group(1))
                    elif f" {variable}\n" in roles:
                        self.assertEqual(name, "ToolsTask")
                    else:
                        self.assertIn(f'"{variable}"', sources)
        print(f"names: {named} variables of tasks are read by refarch or by roles.sql")

    def test_a_wrong_name_is_noticed(self):
        answer = config({"REFARCH_QUEUE_VISIBILITY": "60"})
        self.assertEqual(answer.returncode, 1)
        self.assertIn("visibility_s", answer.stderr)

    def test_the_services_verify_the_database_and_choose_sqs(self):
        for name, _, container in containers(load()):
            answer = config(self.values(container)).stdout
            for line in ('kind = "sqs"', 'kind = "pinecone"', 'sslmode = "verify-full"', 'sslrootcert = "/etc/ssl/rds.pem"'):
                self.assertIn(line, answer, name)

    def test_the_tools_run_what_the_image_has(self):
        dockerfile = (ROOT / "Dockerfile").read_text()
        script = "\n".join(path.read_text() for path in (ROOT / "scripts").glob("deploy*aws*"))
        for path in set(re.findall(r"psql -f (\S+?)\"", script)):
            self.assertIn(f" {path}\n", dockerfile)
            self.assertTrue((ROOT / "config" / pathlib.Path(path).name).exists())


if __name__ == "__main__":
    unittest.main()
