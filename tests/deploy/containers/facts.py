"""What the files of a deployment are compared with: the settings, the commands, the image, the metrics."""

import os
import re

import yaml

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))

# Variables of the environment that are not named REFARCH_..., and that refarch or its libraries read.
OTHER_VARIABLES = {
    *("POSTGRES_DB_" + part for part in ("HOST", "PORT", "NAME", "USER", "PASSWORD")),
    "DATABASE_URL",
    "PGSSLMODE",
    "PGSSLROOTCERT",
    "SQS_QUEUE_URL",
    "SQS_BULK_QUEUE_URL",
    "SQS_DEAD_LETTER_QUEUE_URL",
    "AWS_ENDPOINT_URL_SQS",
    "AWS_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "PINECONE_API_KEY",
    "PINECONE_INDEX",
    "PINECONE_INDEX_HOST",
    "PINECONE_NAMESPACE",
    "OPENAI_API_KEY",
}

# The roles that log in as somebody of their own, and what the migration gives them rights with. The owner migrates.
LOGINS = {role: "refarch_" + role for role in ("listen", "embed", "serve")}
OWNER = "refarch"
MIGRATION = "refarch psql -q -f /etc/refarch/roles.sql && exec refarch migrate --roles %s" % (
    ",".join("%s=%s" % login for login in LOGINS.items()) + "${REFARCH_SERVE_EDIT_TOKEN:+,edit=refarch_serve}"
)

# The reference architecture's numbers for the service that embeds, and scaling.backlog_s with its cooldowns. The
# settings win where they exist.
LEAST, MOST, CPU_PERCENT = 2, 50, 25
BACKLOG_S, COOLDOWN_S = 10, 30


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def settings():
    """Every setting with its default, as text."""
    found, section = {}, ""
    for line in read("config/default.toml").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line and not line.startswith("#"):
            key, _, value = line.partition(" = ")
            found["%s.%s" % (section, key)] = value.strip('"')
    return found


SETTINGS = settings()


def setting(path, otherwise):
    return type(otherwise)(SETTINGS.get(path, otherwise))


def commands():
    """The subcommands of refarch."""
    body = re.search(r"pub enum Command \{\n(.*?)\n\}", read("src/cli.rs"), re.S).group(1)
    return {name.lower() for name in re.findall(r"^    ([A-Z][a-z]+)[(, {]", body, re.M)}


def metrics():
    """The metrics, each with the roles that have it."""
    text = read("src/role/admin/catalogue.rs")
    roles = dict(re.findall(r'^const ([A-Z]+): &str = "(.*)";', text, re.M))
    found = re.findall(r'^    [A-Z_0-9]+: \w+ "(\w+)"[^;]*? of ([A-Z]+|"[^"]*");', text, re.M)
    return {name: roles.get(who, who.strip('"')) for name, who in found}


def image(text):
    """What an image sets: its variables, and its instructions by name."""
    instructions = {}
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            instructions.setdefault(name, []).append(rest)
    last_env = dict(pair.split("=", 1) for pair in instructions["ENV"][-1].split())
    return instructions, last_env


INSTRUCTIONS, IMAGE_ENV = image(read("Dockerfile"))
PAGE_PORT = int(IMAGE_ENV["REFARCH_SERVE_BIND"].rpartition(":")[2])
ADMIN_PORT = int(IMAGE_ENV["REFARCH_ADMIN_LISTEN"].rpartition(":")[2])
GRACE_S = setting("runtime.grace_s", 20)


def passwords():
    """The variables that config/roles.sql reads: the password of each role."""
    return dict(re.findall(r"^\\getenv (\w+) (\w+)$", read("config/roles.sql"), re.M))


def is_known_variable(name):
    if name.startswith("REFARCH_"):
        return name[len("REFARCH_") :].lower().replace("_", ".", 1) in SETTINGS
    return name in OTHER_VARIABLES or name in passwords().values()


def is_secret(name):
    """Whether a variable's value should not be read by everybody."""
    return bool(re.search(r"PASSWORD|TOKEN|API_KEY|SECRET|DATABASE_URL", name))


def seconds(text):
    """A duration of compose."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


class Checks:
    """Counts what was checked, and keeps what is wrong."""

    def __init__(self):
        self.count = 0
        self.faults = []

    def that(self, holds, fault):
        self.count += 1
        if not holds:
            self.faults.append(fault)
        return bool(holds)


def set_at(place, path, value):
    """Sets the value at a path of keys. None removes it."""
    *way, last = path
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
