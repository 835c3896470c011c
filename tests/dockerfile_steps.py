"""A target's steps of the Dockerfile as a shell script, to try them in a Debian tree without Docker.

    python tests/dockerfile_steps.py context FOLDER        # what .dockerignore lets into the build context
    python tests/dockerfile_steps.py steps cpu > steps.sh  # the script; CONTRIBUTING.md shows how it is run

The script copies a tree for each stage, so that what a stage does not copy from another is not there, and runs each RUN
under `chroot` with the environment, user, folder and shell that the file gives it. It knows the instructions that this
Dockerfile uses, and refuses the others.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile import HEREDOC, ROOT, Instruction, Stage, chain, parse, write_context

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_WITHOUT_STEPS = ("LABEL", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "MAINTAINER")
_HEAD = """#!/usr/bin/env bash
# Steps of the target {target}, made from the Dockerfile by tests/dockerfile_steps.py. As root:
#   BASE=<a tree with what the base image holds> CONTEXT=<the build context> WORK=<an empty folder> bash steps.sh
#   ... bash steps.sh run COMMAND ...   what `docker run` would do, in the tree that is there
# SHARED names folders of this machine that are seen at the same place in the tree (a package index on disk).
set -euo pipefail
# Mounts in a namespace of their own: whatever happens, they are gone with this script.
[ -n "${{APART-}}" ] || APART=1 exec unshare --mount --propagation private bash "$0" "$@"
: "${{BASE:?}}" "${{CONTEXT:?}}" "${{WORK:?}}"
mounted=()
attach() {{ mkdir -p "$2"; mount "${{@:3}}" "$1" "$2"; mounted=("$2" "${{mounted[@]}}"); }}
detach() {{ for place in "${{mounted[@]}}"; do umount --lazy "$place"; done; mounted=(); }}
trap detach EXIT
enter() {{
  attach /proc "$1/proc" --rbind
  attach /dev "$1/dev" --rbind
  for place in ${{SHARED-}}; do attach "$place" "$1$place" --bind --read-only; done
}}
from() {{
  printf '\\n== stage %s from %s (%s)\\n' "$2" "$1" "$(date -u +%H:%M:%S)"
  [ ! -e "$WORK/$2" ] || {{ echo "error: $WORK/$2 is there already; name an empty folder" >&2; exit 2; }}
  cp -a "$3" "$WORK/$2"
}}
step() {{ printf -- '-- line %s: %s (%s)\\n' "$1" "$2" "$(date -u +%H:%M:%S)"; }}
"""


def script(stages: list[Stage], target: str) -> str:
    """The shell script of a target. Raises ValueError for an instruction that it does not know."""
    parts, states = [_HEAD.format(target=target)], dict[str, State]()
    steps = list[str]()
    for stage in chain(stages, target):
        parent = states.get(stage.image)
        state = State(stage.name) if parent is None else parent.child(stage.name)
        states[stage.name] = state
        tree = '"$BASE"' if parent is None else f'"$WORK"/{stage.image}'
        steps.append(f"from {shlex.quote(stage.image)} {stage.name} {tree}")
        for instruction in stage.instructions:
            steps += state.take(instruction)
    final = states[target]
    run = [f'  enter "$WORK"/{target}', f'  {final.chroot(final.entrypoint)} "$@"', "  exit"]
    parts += ['if [ "${1-}" = run ]; then', "  shift", f"  [ $# -gt 0 ] || set -- {shlex.join(final.command)}", *run]
    return "\n".join([*parts, "fi", *steps, ""])


@dataclass
class State:
    """What an instruction finds: environment, user, folder, shell, and the image's command."""

    stage: str
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0"
    folder: str = "/"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def child(self, stage: str) -> State:
        """As a stage above finds it: arguments end with their stage."""
        kept = (dict(self.environment), {}, self.user, self.folder, list(self.shell))
        return State(stage, *kept, list(self.entrypoint), list(self.command))

    def take(self, given: Instruction) -> list[str]:
        """Lines of the script for one instruction; what it sets is remembered."""
        if given.name == "RUN":
            return self._run(given)
        if given.name == "COPY":
            return self._copy(given)
        if given.name == "WORKDIR":
            self.folder = str(Path(self.folder) / self._filled(given.rest))
            return [self._root(f"mkdir -p {shlex.quote(self.folder)}")]
        if given.name == "ENV":
            for pair in shlex.split(given.rest):
                name, _, value = pair.partition("=")
                self.environment[name] = self._filled(value)
        elif given.name == "ARG":
            (pair,) = shlex.split(given.rest)
            name, _, value = pair.partition("=")
            self.arguments[name] = value
        elif given.name == "USER":
            self.user = given.rest
        elif given.name in ("SHELL", "ENTRYPOINT", "CMD"):
            words = given.words()
            if words is None:
                raise ValueError(f"line {given.line}: {given.name} is not in the exec form")
            setattr(self, {"SHELL": "shell", "ENTRYPOINT": "entrypoint", "CMD": "command"}[given.name], words)
        elif given.name not in _WITHOUT_STEPS:
            raise ValueError(f"line {given.line}: {given.name} is not known here")
        return []

    def chroot(self, words: list[str]) -> str:
        """A command as the image's user, with the image's environment, in its folder."""
        user = shlex.quote(self.user.partition(":")[0])
        home = f"HOME=\"$(awk -F: -v u={user} '$3 == u || $1 == u {{ print $6 }}' "
        home += f'"$WORK"/{self.stage}/etc/passwd)"'
        pairs = [shlex.quote(f"{name}={value}") for name, value in self.environment.items()]
        # An argument of the build may be given to the script by the same name.
        pairs += [
            f'{name}="${{{name}-{shlex.quote(value) if value else ""}}}"' for name, value in self.arguments.items()
        ]
        inside = f'cd {shlex.quote(self.folder)} && exec "$@"'
        start = (
            f'chroot --userspec={shlex.quote(self.user)} "$WORK"/{self.stage} /usr/bin/env -i {home} {" ".join(pairs)}'
        )
        return f"{start} /bin/sh -c {shlex.quote(inside)} sh {shlex.join(words)}".rstrip()

    def _root(self, text: str) -> str:
        return f'chroot "$WORK"/{self.stage} /bin/sh -c {shlex.quote(text)}'

    def _run(self, given: Instruction) -> list[str]:
        lines = [f"step {given.line} {shlex.quote(given.rest[:90])}", f'enter "$WORK"/{self.stage}']
        after: list[str] = []
        for mount in given.mounts():
            place = f'"$WORK"/{self.stage}{mount.get("target", "")}'
            if mount["type"] == "cache":
                kept = f'"$WORK"/.cache{mount["target"]}'
                lines += [f"mkdir -p {kept}", f"attach {kept} {place} --bind"]
            elif mount["type"] == "bind" and "from" not in mount:
                # What a step writes into it is thrown away, as Docker does.
                source = mount.get("source", ".")
                lines.append(f'rm -rf {place}; mkdir -p {place}; cp -a "$CONTEXT"/{source}/. {place}/')
                after.append(f"rm -rf {place}")
            else:
                raise ValueError(f"line {given.line}: a mount of type {mount['type']} is not known here")
        words = given.words()
        if words is None:
            words = [*self.shell, given.heredocs[0] if given.rest.startswith("<<") else _shell_text(given)]
        return [*lines, self.chroot(words), "detach", *after]

    def _copy(self, given: Instruction) -> list[str]:
        tree = f'"$WORK"/{self.stage}'
        *sources, target = [self._filled(word) for word in (given.words() or shlex.split(given.rest))]
        place = target if target.startswith("/") else str(Path(self.folder) / target)
        lines = [f"step {given.line} {shlex.quote('COPY ' + given.rest[:90])}"]
        origin = [f'"$WORK"/{name}' for name in given.options("from")] or ['"$CONTEXT"']
        into_folder = place.endswith("/") or len(sources) > 1
        lines.append(f"mkdir -p {tree}{shlex.quote(place if into_folder else str(Path(place).parent))}")
        for number, source in enumerate(sources):
            if source.startswith("<<"):
                lines.append(f"printf %s {shlex.quote(given.heredocs[number])} > {tree}{shlex.quote(place)}")
            else:
                found = f"{origin[0]}/{shlex.quote(source.lstrip('/'))}"
                # A folder's content is copied, not the folder.
                lines.append(f"if [ -d {found} ]; then mkdir -p {tree}{place}; cp -a {found}/. {tree}{place}/; "
                             f"else cp -a {found} {tree}{place}; fi")  # fmt: skip
        owner = given.options("chown")
        lines += [self._root(f"chown -R {shlex.quote(each)} {shlex.quote(place)}") for each in owner]
        lines += [self._root(f"chmod -R {shlex.quote(each)} {shlex.quote(place)}") for each in given.options("chmod")]
        return lines

    def _filled(self, text: str) -> str:
        known = self.arguments | self.environment
        return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: known.get(found[1] or found[2], ""), text)


def _shell_text(given: Instruction) -> str:
    """RUN's text with the heredocs that it opens in its middle (`RUN python <<EOF`)."""
    ends = [end for _, end in HEREDOC.findall(given.rest)]
    return "\n".join([given.rest, *(f"{body}{end}" for body, end in zip(given.heredocs, ends, strict=True))])


def main() -> None:
    """Writes a context, or prints a target's script."""
    parser = argparse.ArgumentParser(description="Steps of the Dockerfile without Docker.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("context").add_argument("folder", type=Path)
    verbs.add_parser("steps").add_argument("target")
    options = parser.parse_args()
    if options.verb == "context":
        write_context(options.folder)
    else:
        sys.stdout.write(script(parse((ROOT / "Dockerfile").read_text(encoding="utf-8")), options.target))


if __name__ == "__main__":
    main()
