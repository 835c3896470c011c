"""`quantize schemes`: the formats, where they run, and what is missing here."""

from __future__ import annotations

import argparse

from quantize.schemes import SCHEMES

SUMMARY = "print the formats: bits, groups, where they run, how fast, what is missing here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(options: argparse.Namespace) -> None:
    """Prints them."""
    from quantize.hardware import missing_for

    for scheme in SCHEMES.values():
        groups = ", ".join(map(str, scheme.group_sizes)) or "per row"
        print(f"{scheme.name}: {scheme.summary}")
        print(f"  {scheme.bits:g} bits; group size {scheme.group_size or 'per row'} (of {groups})")
        for target in scheme.targets.values():
            missing = missing_for(target)
            print(f"  {target.name}: {'runs here' if not missing else 'missing here: ' + '; '.join(missing)}")
            print(f"    speed: {target.speed or 'not measured'}")
