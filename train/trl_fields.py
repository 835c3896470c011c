"""Names that trl and transformers know, read from their source text: importing them takes seconds and torch."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path


def config_name(method: str) -> str:
    """TRL's class of the settings of a `train.method`."""
    return f"{method.upper()}Config"


def trl_fields(method: str) -> frozenset[str]:
    """The field names of the installed SFTConfig (or DPOConfig, GRPOConfig) and its bases; empty without trl.

    Read from the source text: importing trl takes seconds and torch, and must not come before unsloth.
    """
    bodies = [
        _class_body("trl", f"trainer/{method}_config.py", config_name(method)),
        _class_body("trl", "trainer/base_config.py", "_BaseConfig"),
        _class_body("transformers", "training_args.py", "TrainingArguments"),
    ]
    if not all(bodies):
        return frozenset()  # another layout of these packages: trl itself will check
    return frozenset(
        node.target.id
        for body in bodies
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    )


def dpo_losses() -> list[str]:
    """The names of TRL's DPO losses, from the trainer's source text; empty where it is not found."""
    try:
        spec = importlib.util.find_spec("trl")
        assert spec is not None and spec.origin is not None
        text = (Path(spec.origin).parent / "trainer" / "dpo_trainer.py").read_text(encoding="utf-8")
    except (ImportError, AssertionError, OSError, ValueError):
        return []
    return sorted(set(re.findall(r'loss_type == "(\w+)"', text)))


def enum_values(name: str) -> list[str]:
    """The values of one of transformers' enumerations; empty where it is not found."""
    files = ("training_args.py", "trainer_utils.py")
    body = next((body for file in files if (body := _class_body("transformers", file, name))), [])
    return [
        str(node.value.value) for node in body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    ]


def _class_body(package: str, file: str, name: str) -> list[ast.stmt]:
    try:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    except (ImportError, AssertionError, OSError, SyntaxError, ValueError):
        return []
    return next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), [])
