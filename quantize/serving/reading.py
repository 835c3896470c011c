"""Whether torchao reads a checkpoint: the one that is installed here, or that of vLLM's environment.

For the latter this file is run by its Python, as a program of its own: JSON {"config", "classes"} on stdin, a JSON list
of faults on stdout. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any


def faults_of(config: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """What torchao cannot read, in words.

    Args:
        config: `default` of config.json's quant_type, read as vLLM reads it.
        classes: of the tensors, as the files' headers name them.
    """
    from torchao.core.config import config_from_dict
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES

    found = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            config_from_dict(dict(config))
        except Exception as error:  # whatever its constructors raise
            found.append(f"its config {config.get('_type')}: {' '.join(str(error).split())[:300]}")
    # It goes on with a config of another version, whose tensors are of other classes than those that it makes now.
    versions = {str(each.message).partition("config: ")[2].partition(", please")[0] for each in warned}
    found += [f"its config {config.get('_type')} ({each})" for each in sorted(versions) if each.startswith("stored_v")]
    unknown = sorted(set(classes) - set(ALLOWED_TENSORS_SUBCLASSES))
    if unknown:
        found.append(f"its tensors {', '.join(unknown)}")
    return found


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print("\n" + json.dumps(faults_of(asked["config"], asked["classes"])))
