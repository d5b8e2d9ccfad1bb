"""The checks of the template beyond what cfn-lint knows: what runs them."""

import importlib

from template import parameter_sets

ALL = []


class Check:
    """Counts what was asserted, and collects what does not hold."""

    def __init__(self, template):
        self.template = template
        self.sets = parameter_sets(template)
        self.asserted = 0
        self.faults = []

    def that(self, holds, fault):
        self.asserted += 1
        if not holds:
            self.faults.append(fault)


def check(function):
    """Declares a check: a function that gets a Check."""
    ALL.append(function)
    return function


def run(template):
    """Runs every check. Returns the number of assertions, and the faults of each check."""
    for module in ("safety", "services", "signals"):
        importlib.import_module(module)
    asserted, faults = 0, {}
    for function in ALL:
        c = Check(template)
        function(c)
        asserted += c.asserted
        if c.faults:
            faults[function.__name__] = c.faults
    return asserted, faults
