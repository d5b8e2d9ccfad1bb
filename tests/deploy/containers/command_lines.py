"""Finds the command lines of refarch in files: as lists in YAML, JSON and Python, and in a shell's words."""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

import yaml
from facts import ROOT, image

sys.path.append(os.path.join(ROOT, "tests", "deploy", "aws"))
import template  # noqa: E402

# What a reader puts something in place of, and what a script does.
PLACEHOLDERS = (
    (r"\$shell\b|\bSHELL\b", "bash"),
    (r"\$\{[^}]*\}|\$\w+", "1"),
    (r"\bMIN\.\.MAX\b", "1..2"),
    (r"(?<![\w-])[A-Z]+(?![\w-])", "1"),
)
OPERATORS = {"|", "||", "&", "&&", ";", ";;", ">", ">>", "<", "(", ")"}
# What comes before a program.
BEFORE = {"$", "exec", "sudo", "nohup", "nice", "time"}
SHELLS = (["/bin/sh", "-c"], ["sh", "-c"])


def of(path, text):
    """The argument lists of refarch in a file."""
    if path.endswith("Dockerfile"):
        yield from of_image(text)
    elif path.endswith("aws/refarch.yaml"):
        yield from of_template(text)
    elif path.endswith((".yaml", ".yml")):
        for document in yaml.safe_load_all(text):
            yield from of_containers(document)
    elif path.endswith(".py"):
        yield from of_calls(text)
    elif path.endswith(".md"):
        for code in of_page(text):
            yield from of_shell(code)
        return
    else:
        yield from of_shell(text)
    # Usage, in the comments at the top.
    yield from of_shell("\n".join(re.findall(r"^# {2,}(\w.*)$", text, re.M)))


def of_image(text):
    instructions, _ = image(text) if "\nENV " in text else ({}, {})
    for line in instructions.get("CMD", []):
        yield json.loads(line)
    for line in instructions.get("HEALTHCHECK", []):
        yield from of_list(json.loads(line.partition("CMD ")[2]))


def of_template(text):
    for _, _, container in template.containers(template.load(text)):
        if container.get("EntryPoint") in SHELLS:
            yield from of_shell("\n".join(container["Command"]))
        else:
            yield container["Command"]
        yield from of_list(container.get("HealthCheck", {}).get("Command", []))


def of_containers(value):
    """Of the containers in a manifest, and of the services in a compose file."""
    if isinstance(value, list):
        for one in value:
            yield from of_containers(one)
        return
    if not isinstance(value, dict):
        return
    if re.fullmatch(r"refarch|\$\{REFARCH_IMAGE:-refarch\}", str(value.get("image"))):
        # Kubernetes has command before args, compose has entrypoint before command.
        args = value.get("args", []) if "args" in value else value.get("command", [])
        program = value.get("command", []) if "args" in value else value.get("entrypoint", [])
        if program[-2:] in SHELLS:
            yield from of_shell("\n".join(args).replace("$$", "$"))
        elif args:
            yield args
        yield from of_list((value.get("healthcheck") or {}).get("test", []))
    for one in value.values():
        yield from of_containers(one)


def of_list(words):
    """Of a list that begins with the program, such as that of a health check."""
    words = [word for word in words if word != "CMD"]
    if words[:1] == ["refarch"]:
        yield words[1:]


def of_calls(text):
    """Of the calls of tool() in Python."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tool":
            yield [getattr(arg, "value", "1") if isinstance(arg, ast.Constant) else "1" for arg in node.args]


def of_page(text):
    """The code of a page in Markdown: blocks of a shell, and code within lines."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        if language in ("sh", "bash"):
            yield block
        elif not language:
            yield "\n".join(re.findall(r"^\$ (.*)$", block, re.M))
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        if code.startswith("run -- "):
            yield "scripts/deploy-aws " + code
        elif re.match(r"(refarch|scripts/deploy-aws|docker) ", code):
            yield code


def commands(text):
    """The simple commands of a shell's text, as lists of words, without here-documents."""
    text = re.sub(r"<<'?(\w+)'?.*?\n\1$", "", text, flags=re.M | re.S)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not re.search(r"refarch|deploy-aws", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.commenters = "#"
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            # A part of a text over several lines.
            continue
        command = []
        for word in [*words, ";"]:
            if word in OPERATORS:
                yield command
                command = []
            else:
                command.append(word)


def of_shell(text):
    for words in commands(text):
        while words and (words[0] in BEFORE or re.match(r"\w+=|[\w-]+:$", words[0])):
            words = words[1:]
        args = arguments(words)
        if args is not None:
            yield [filled(word) for word in args if word not in ("...", "[ARGS]", "$@")]


def arguments(words):
    """What refarch gets by a command; None if it is not run."""
    if not words:
        return None
    program = os.path.basename(words[0])
    if program == "refarch":
        return words[1:]
    if program == "deploy-aws" and words[1:2] == ["run"] and "--" in words:
        return words[words.index("--") + 1 :]
    if program == "docker" and "compose" in words[1:2]:
        return words[words.index("tool") + 1 :] if {"run", "tool"} <= set(words) else None
    if program in ("docker", "kubectl") and words[1] in ("run", "exec") and "refarch" in words:
        # The last one is the name of the image, or of the program.
        return words[len(words) - words[::-1].index("refarch") :]
    return None


def filled(word):
    for pattern, value in PLACEHOLDERS:
        word = re.sub(pattern, value, word)
    return word


def deployments(text):
    """The argument lists of scripts/deploy-aws in a page."""
    for code in of_page(text):
        for words in commands(code):
            if words and words[0] == "scripts/deploy-aws" and not {"--help", "..."} & set(words):
                yield words[1:]


@contextlib.contextmanager
def deployment(texts):
    """A copy of scripts/deploy-aws and of what it reads, with these texts, to be called in dry runs."""
    with tempfile.TemporaryDirectory() as folder:
        for source in ("scripts", "config/aws"):
            shutil.copytree(os.path.join(ROOT, source), os.path.join(folder, source))
        for path, text in texts.items():
            if os.path.exists(os.path.join(folder, path)):
                with open(os.path.join(folder, path), "w", encoding="utf-8") as file:
                    file.write(text)

        def run(args):
            # An image that is named is not built, and there is no git here that could name one.
            image = ["--image", "v1"] if args[:1] == ["up"] and "--image" not in args else []
            return subprocess.run(
                [os.path.join(folder, "scripts/deploy-aws"), *args[:1], "--dry-run", *image, *args[1:]],
                capture_output=True,
                text=True,
                check=False,
                env={"PATH": os.environ["PATH"], "AWS_REGION": "us-east-1"},
            )

        yield run
