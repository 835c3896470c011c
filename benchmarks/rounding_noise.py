"""How far two computations of the same quantised model differ that differ in the last bits only: the noise floor.

    python benchmarks/rounding_noise.py --config quickstart.yaml --schemes int8-int4 fp8 --samples 64

The untouched model is evaluated in the plain graph with transformers' two attention implementations, which sum in
another order: once as it is (bf16 on CUDA, float32 on the CPU), and once with each scheme's fake quantisation. A format
that rounds activations turns a last-bit difference into another rounding, layer after layer. Two backends cannot agree
better than this. Losses and differences are nats per answer token. Options after `--` go to the config.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def main() -> int:
    """Prints one line for the plain model and one for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--schemes", nargs="+", default=["int8-int4"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where the model and the data are kept")
    options, rest = parser.parse_known_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantize.evaluate import Sample, evaluate_model
    from quantize.hardware import pick_target
    from quantize.layers import select_layers
    from quantize.schemes import find_scheme
    from quantize.simulate import simulate_
    from train.config_loading import load_config
    from train.data import prepare_data
    from train.models import resolve_model

    config = load_config(options.config, [word for word in rest if word != "--"])
    folder = resolve_model(config.model, cache=options.root / ".cache", seed=config.run.seed).folder
    data = config.data.model_copy(update={"eval_samples": options.samples})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = prepare_data(data, tokenizer, max_length=config.train.max_length, seed=config.run.seed).eval
    samples = [Sample(row["input_ids"], row["loss_mask"]) for row in rows]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name in (None, *options.schemes):
        scores = []
        for attention in ("sdpa", "eager"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
            if name is not None:
                scheme = find_scheme(name)
                size = scheme.pick_group_size(config.quantize.group_size)
                target = pick_target(scheme, None)[0]
                simulate_(model, scheme, target, size, select_layers(model, scheme, size, target))
            scores.append(evaluate_model(model.to(device), samples, batch_size=config.eval.batch_size))
        sdpa, eager = scores
        apart = np.abs(sdpa.nll - eager.nll) / sdpa.tokens
        line = {"scheme": name, "dtype": str(dtype), "sdpa.loss": sdpa.loss, "eager.loss": eager.loss}
        print(json.dumps(line | {"mean |difference| of a sample": apart.mean(), "largest": apart.max()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
