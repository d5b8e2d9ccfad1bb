"""Runs the fleet of config/compose.yaml for real, in Docker, and makes it hard.

    python3 tests/deploy/containers/fleet.py [--rows 10000] [--keep]

It needs docker-compose (or docker compose), the image `refarch`, and the images in images/, which scripts/fleet makes.
Each role has to be logged in as a database role of its own. 10,000 rows are loaded. Meanwhile one embed is killed, one is
paused, and a listen is started again; `verify` has to find nothing. Then every container of all three roles is replaced,
one by one, while clients search and rows are edited: no search may fail, and `verify` has to find nothing again. The
database may refuse no role anything. All traffic stays on this machine.
"""

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))
PROJECT = "refarch-fleet"
PORT = 3080
SEARCHERS = 2
# Searches one client makes in a second at most.
PACE_S = 0.1
WORDS = [
    "lamp",
    "desk",
    "running shoes",
    "coffee mug",
    "wireless keyboard",
    "garden chair",
    "toy for a child",
]


def say(text):
    print("fleet: %7.1f s  %s" % (time.monotonic() - STARTED, text), flush=True)


def run(*command, check=True, **kind):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kind)
    if check and done.returncode != 0:
        sys.exit("fleet: %s failed:\n%s\n%s" % (" ".join(command), done.stdout[-2000:], done.stderr[-4000:]))
    return done


def compose(*args, check=True):
    files = ["-f", "config/compose.yaml", "-f", "tests/deploy/containers/fleet.yaml"]
    return run(*COMPOSE, "-p", PROJECT, *files, *args, check=check, cwd=ROOT)


def containers(role):
    """The running containers of a role, oldest first."""
    label = "label=com.docker.compose.service=" + role
    ids = run(
        "docker",
        "ps",
        "--quiet",
        "--no-trunc",
        "--filter",
        "label=com.docker.compose.project=" + PROJECT,
        "--filter",
        label,
    ).stdout.split()
    return sorted(ids, key=lambda one: inspect(one)["Created"])


def inspect(container):
    return json.loads(run("docker", "inspect", container).stdout)[0]


def health(container):
    return inspect(container)["State"]["Health"]["Status"]


def wait(what, seconds, condition):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.5)
    sys.exit("fleet: %s did not come within %d s" % (what, seconds))


def tool(*args, check=True):
    return compose("run", "--rm", "-T", "tool", *args, check=check)


def status():
    done = tool("status", "--json", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def wait_for_health(role, count):
    wait(
        "%d healthy %s" % (count, role),
        300,
        lambda: [health(one) for one in containers(role)].count("healthy") >= count,
    )


def verify():
    done = tool("verify", "--json", check=False)
    say("verify: exit code %d: %s" % (done.returncode, done.stdout.strip()[:600]))
    if done.returncode != 0:
        sys.exit("fleet: index and table differ\n" + done.stderr[-2000:])


def crash(container):
    """Ends the first process of a container, as a crash does. `docker kill` would count as a stop by hand."""
    os.kill(inspect(container)["State"]["Pid"], signal.SIGKILL)


def disturb(rows):
    first, second = containers("embed")[:2]
    wait("some searchable rows", 600, lambda: status().get("in_sync", 0) > rows / 20)
    before = inspect(first)["RestartCount"]
    crash(first)
    say("killed %s" % inspect(first)["Name"])
    wait("the killed container", 60, lambda: inspect(first)["RestartCount"] > before)
    run("docker", "pause", second)
    say("paused %s" % inspect(second)["Name"])
    listen = containers("listen")[0]
    run("docker", "restart", "--time", "30", listen)
    say("restarted %s" % inspect(listen)["Name"])
    # Longer than a heartbeat may be late.
    time.sleep(20)
    run("docker", "unpause", second)
    state = status()
    say(
        "unpaused %s; %s of %s rows are searchable"
        % (inspect(second)["Name"], state.get("in_sync"), state.get("source_rows"))
    )


class Searchers:
    """Clients that search until they are stopped."""

    def __init__(self):
        self.stopped = threading.Event()
        self.codes = collections.Counter()
        self.times = []
        self.failures = []
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.work, args=(number,)) for number in range(SEARCHERS)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def work(self, number):
        turn = number
        while not self.stopped.wait(PACE_S):
            # Each another text, so that no cache answers.
            turn += 1
            words = "%s %d" % (WORDS[turn % len(WORDS)], turn)
            address = "http://127.0.0.1:%d/api/v1/search?q=%s" % (PORT, words.replace(" ", "+"))
            begun = time.monotonic()
            try:
                with urllib.request.urlopen(address, timeout=30) as answer:
                    found = len(json.load(answer)["rows"])
                    outcome = "ok" if found else "empty"
            except Exception as error:
                outcome = "%s %s" % (type(error).__name__, error)
            with self.lock:
                self.codes[outcome] += 1
                self.times.append(time.monotonic() - begun)
                if outcome != "ok":
                    self.failures.append((round(time.monotonic() - STARTED, 1), outcome))


def ask(command):
    """The balancer's answer to a command."""
    (balancer,) = containers("balancer")
    line = "echo '%s' | socat stdio /tmp/haproxy.sock" % command
    return run("docker", "exec", balancer, "sh", "-c", line).stdout


def places(address):
    """The names under which the balancer knows an address."""
    servers = [line.split() for line in ask("show servers state serve").splitlines()]
    return [fields[3] for fields in servers if len(fields) > 5 and fields[4] == address]


def drain(container):
    """Takes a serve out of the balancer, as Kubernetes takes a pod that ends out of its Service. Returns its address."""
    networks = inspect(container)["NetworkSettings"]["Networks"]
    (address,) = (network["IPAddress"] for network in networks.values())
    names = places(address)
    if not names:
        sys.exit("fleet: the balancer does not know %s" % address)
    for name in names:
        ask("set server serve/%s state drain" % name)
        wait("the last request of %s" % name, 30, lambda: sessions(name) == "0")
    return address, names


def sessions(name):
    for line in ask("show stat serve -1 -1").splitlines():
        fields = line.split(",")
        if fields[:2] == ["serve", name]:
            return fields[4]
    return "0"


def replace(role, count):
    """Each container of a role by a new one: the new one first, then the old one goes."""
    for old in containers(role)[:count]:
        compose("up", "--detach", "--no-recreate", "--no-deps", "--scale", "%s=%d" % (role, count + 1), role)
        wait_for_health(role, count + 1)
        if role == "serve":
            # The balancer looks each half second.
            time.sleep(2)
            address, names = drain(old)
        name = inspect(old)["Name"]
        run("docker", "stop", "--time", "30", old)
        code = inspect(old)["State"]["ExitCode"]
        run("docker", "rm", "--volumes", old)
        if role == "serve":
            # The next container may get the place, but not before the balancer has forgotten the old one.
            wait("the balancer to forget %s" % address, 60, lambda: not places(address))
            for place in names:
                ask("set server serve/%s state ready" % place)
        say("replaced %s (it ended with %d)" % (name, code))
        if code != 0:
            sys.exit("fleet: %s did not end by itself" % name)


def psql(user, sql, check=True):
    """Runs a statement in the database. Each user's password is the last word of its name."""
    (server,) = containers("postgres")
    password = "PGPASSWORD=" + user.rpartition("_")[2]
    client = ["psql", "--host=127.0.0.1", "--username=" + user, "--dbname=refarch", "-qAt", "-c", sql]
    return run("docker", "exec", "--env", password, server, *client, check=check)


def edit(stopped):
    """Edits rows all the time."""
    turn = 0
    while not stopped.wait(1):
        turn += 1
        sql = "UPDATE products_with_increment SET description = description || ' %d' WHERE id %% 500 = %d"
        psql("refarch", sql % (turn, turn % 500))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--keep", action="store_true", help="leave the fleet running")
    args = parser.parse_args()
    try:
        scale = [part for role in ("serve", "listen", "embed") for part in ("--scale", role + "=2")]
        compose("up", "--detach", "--no-build", *scale, "serve", "listen", "embed", "balancer")
        for role in ("serve", "listen", "embed"):
            wait_for_health(role, 2)
        say("two of each role are healthy")
        check_rights()
        check_logins()
        begun = time.monotonic()
        tool("generate", "--count", str(args.rows), "--load")
        say("loaded %d rows" % args.rows)
        disturb(args.rows)
        wait("every row to be searchable", 1800, lambda: status().get("in_sync") == args.rows)
        say("%d rows are searchable after %.0f s" % (args.rows, time.monotonic() - begun))
        verify()
        roll()
        verify()
        check_refusals()
        say("done")
    finally:
        if not args.keep:
            compose("down", "--volumes", "--timeout", "30", check=False)


def check_rights():
    """Every role runs as another user than root, and cannot write to its root file system."""
    for role in ("serve", "listen", "embed"):
        for container in containers(role):
            user = run("docker", "exec", container, "id", "-u").stdout.strip()
            write = run("docker", "exec", container, "sh", "-c", "echo x >/usr/local/x", check=False)
            if user == "0" or write.returncode == 0:
                sys.exit("fleet: %s is root, or can write its files" % role)
            written = run("docker", "diff", container).stdout.strip()
            if written:
                sys.exit("fleet: %s wrote %s" % (role, written))
    say("no role is root, and none can write to its root file system")


def check_logins():
    """Every role is logged in as a database role of its own, which cannot remove what refarch keeps."""
    wanted = {"refarch_serve", "refarch_listen", "refarch_embed"}
    found = psql("refarch", "SELECT DISTINCT usename FROM pg_stat_activity WHERE datname = 'refarch'")
    if not wanted <= set(found.stdout.split()):
        sys.exit("fleet: logged in are %s" % found.stdout.split())
    for user in sorted(wanted):
        dropped = psql(user, "DROP TABLE refarch.outbox", check=False)
        if "must be owner" not in dropped.stderr:
            sys.exit("fleet: %s may remove the outbox: %s" % (user, dropped.stderr))
    say("each role has a login of its own, and none can remove the outbox")


def check_refusals():
    """Nothing was refused by the database while the roles worked."""
    (server,) = containers("postgres")
    done = run("docker", "logs", server)
    refused = [line for line in (done.stdout + done.stderr).splitlines() if "permission denied" in line]
    if refused:
        sys.exit("fleet: the database refused:\n%s" % "\n".join(refused[:10]))
    say("the database refused no role anything")


def roll():
    stopped = threading.Event()
    editor = threading.Thread(target=edit, args=(stopped,))
    with Searchers() as searchers:
        editor.start()
        for role in ("serve", "listen", "embed"):
            replace(role, 2)
        stopped.set()
        editor.join()
    times = sorted(searchers.times)
    text = ", ".join("%d %s" % (count, outcome) for outcome, count in searchers.codes.most_common())
    say(
        "searches while six containers were replaced: %s; p50 %.0f ms, worst %.0f ms"
        % (text, times[len(times) // 2] * 1e3, times[-1] * 1e3)
    )
    if searchers.failures:
        sys.exit("fleet: searches failed: %s" % searchers.failures[:10])


STARTED = time.monotonic()
COMPOSE = ["docker", "compose"]

if __name__ == "__main__":
    if run(*COMPOSE, "version", check=False).returncode != 0:
        COMPOSE = ["docker-compose"]
    main()
