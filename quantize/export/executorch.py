"""A quantised checkpoint as ExecuTorch's .pte: XNNPACK's kernels, a KV cache, and the weights as they are.

Nothing is quantised here. The integers and scales of the checkpoint go into ExecuTorch's own Transformer (the one that
its Llama and Qwen3 exports use), whose attention and cache are its custom operators, and are lowered to XNNPACK. Runs
in a process that sees ExecuTorch's packages (`quantize.export.environment`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import UserError
from quantize.export.architectures import (
    check_architecture,
    fused_rows,
    layers_without_rope,
    meta_name,
    transformer_arguments,
)

_MIB = 2**20


class NoRotation(nn.Module):
    """The rotary embedding of a layer that has none."""

    def forward(self, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are."""
        return queries, keys


class TiedHead(nn.Module):
    """The output layer of an unquantised embedding: as a matmul XNNPACK leaves it, and the weight is stored once."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> logits (..., V)."""
        return torch.matmul(hidden, self.embedding.weight.t())


def export(job: Mapping[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Exports one quantised checkpoint.

    Keys: source, output (a folder, replaced as a whole when everything is on disk), max_seq_len, layers (the first so
    many only; None = all), round_scales (take a checkpoint whose scales bf16 does not hold), samples (parquet of
    held-out samples; None = none), n_samples, n_tokens.

    Returns:
        what export.json holds.

    Raises:
        UserError: the checkpoint is of another format or architecture.
    """
    from quantize.convert import copy_companions, load_plain
    from quantize.export.verify import verify
    from quantize.storage import replacing

    source, output, length = Path(job["source"]), Path(job["output"]), int(job["max_seq_len"])
    model: Any = load_plain(source, dtype="float32")
    config = model.config.to_dict()
    if job["layers"] is not None:
        config["num_hidden_layers"] = min(job["layers"], config["num_hidden_layers"])
        model.model.layers = model.model.layers[: config["num_hidden_layers"]]
        model.config.num_hidden_layers = config["num_hidden_layers"]
    check_architecture(config, length)
    check_weights(model)
    rounded = round_scales(model)
    if rounded and not job["round_scales"]:
        raise UserError(_why_rounded(model, rounded, source))
    with replacing(output) as partial:
        path = partial / "model.pte"
        transformer = meta_transformer(model, config, length)
        lowered, delegates = lower(transformer, constant_methods(model, config, length), length)
        with path.open("wb") as stream:
            lowered.write_to_file(stream)
        copy_companions(source, partial)
        record = {
            "source": str(source),
            "source_sha256": checkpoint_digest(source),
            "model_type": config["model_type"],
            "layers": config["num_hidden_layers"],
            "max_seq_len": length,
            "delegated_linears": delegates,
            "size_mib": path.stat().st_size / _MIB,
            "rounded_scales": rounded,
            "packages": {name: version(name) for name in ("executorch", "torch", "torchao", "transformers")},
            "against_torch": verify(path, model, source, job),
        }
        (partial / "export.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def _why_rounded(model: Any, rounded: Mapping[str, Any], source: Path) -> str:
    embeds = type(model.get_input_embeddings().weight.data) is not Tensor
    scheme = "int8-int4-mobile" if embeds else "int8-int4"
    return (
        f"XNNPACK keeps scales in bf16, and {rounded['layers']} layers of {source} have other ones: its weights would "
        f"differ from these by up to {rounded['largest_relative_change']:.2%}; make a checkpoint that fits (train "
        f"--qat {scheme} --quantize.target executorch, or quantize convert MODEL --scheme {scheme} --target "
        "executorch), or accept the rounded ones with --allow-rounded-scales"
    )


def quantised_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of those whose weight is a tensor of torchao's."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and type(weight.data) is not Tensor:
            yield name, module


def check_weights(model: nn.Module) -> None:
    """Raises UserError where the quantised weights are not those of int8-int4 or int8-int4-mobile."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    linears = 0
    for name, module in quantised_modules(model):
        weight = module.weight.data
        embeds = isinstance(module, nn.Embedding)
        wanted = (torch.int8, None) if embeds else (torch.int4, "int8_asym_per_token")  # type: ignore[attr-defined]
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            raise UserError(f"{name} is a {type(weight).__name__}: ExecuTorch takes int8-int4 and int8-int4-mobile")
        found = (weight.target_dtype, weight.activation_quantization)
        if found != wanted or bool(weight.zero_point.any()):
            raise UserError(f"{name} is {found[0]} with activations {found[1]}: ExecuTorch takes int8-int4(-mobile)")
        linears += not embeds
    if not linears:
        raise UserError("no linear layer of this checkpoint is quantised: ExecuTorch takes int8-int4(-mobile)")


@torch.no_grad()
def round_scales(model: nn.Module) -> dict[str, Any] | None:
    """Rounds the linears' scales to bf16, in place, as XNNPACK does when it loads them.

    Returns:
        None where all of them are bf16 values already, else how many layers moved and by how much at most.
    """
    layers, largest = 0, 0.0
    for _, module in quantised_modules(model):
        if isinstance(module, nn.Embedding):
            continue  # its kernel keeps float32
        scale = module.weight.data.scale
        nearest = scale.bfloat16().to(scale.dtype)
        if not torch.equal(nearest, scale):
            layers += 1
            largest = max(largest, float(((nearest - scale) / scale).abs().max()))
            scale.copy_(nearest)
    return {"layers": layers, "largest_relative_change": largest} if layers else None


@torch.no_grad()
def meta_transformer(model: Any, config: Mapping[str, Any], length: int) -> nn.Module:
    """ExecuTorch's Transformer with the weights of a transformers model, shared, not copied, and a KV cache."""
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs
    from executorch.examples.models.llama.source_transformation.custom_kv_cache import (
        replace_kv_cache_with_custom_kv_cache,
    )
    from executorch.examples.models.llama.source_transformation.sdpa import replace_sdpa_with_custom_op

    with torch.device("meta"):
        transformer = construct_transformer(ModelArgs(**transformer_arguments(config, length)))
    weights = renamed_weights(model.state_dict(), config)
    missing, unexpected = transformer.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in missing if ".kv_cache." not in name]
    assert not missing and not unexpected, f"missing {missing[:3]}, unexpected {unexpected[:3]}"
    transformer.requires_grad_(False)
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(length).unsqueeze(0))  # (1, T, D)
    transformer.rope.freqs_cos, transformer.rope.freqs_sin = cos[0].contiguous(), sin[0].contiguous()
    if config.get("tie_word_embeddings") and type(model.lm_head.weight.data) is Tensor:
        transformer.output = TiedHead(transformer.tok_embeddings)
    for number in layers_without_rope(config):
        if number < len(transformer.layers):
            transformer.layers[number].attention.rope = NoRotation()
    # In this order: the cache's replacement looks at the attention that it feeds.
    return replace_kv_cache_with_custom_kv_cache(replace_sdpa_with_custom_op(transformer)).eval()  # type: ignore[no-any-return]


def renamed_weights(weights: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under Meta's names, fused ones taken apart."""
    fused = fused_rows(config)
    renamed: dict[str, Any] = {}
    for name, weight in weights.items():
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        start = 0
        for part, rows in fused.get(last, {}).items():
            renamed[meta_name(f"{parent}.{part}.weight")] = take_rows(weight, start, start + rows)
            start += rows
        if last not in fused:
            renamed[meta_name(name)] = weight
    return renamed


def take_rows(weight: Any, start: int, stop: int) -> Any:
    """Rows of a weight (O, I), quantised or not: their integers and scales as they are."""
    if type(weight) is Tensor:
        return weight[start:stop].clone()
    names, attributes = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name)[start:stop].clone() for name in names}
    shape = torch.Size((stop - start, weight.shape[1]))
    return type(weight).__tensor_unflatten__(parts, attributes, shape, None)


def constant_methods(model: Any, config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """What ExecuTorch's runners ask a .pte for."""
    ends = model.generation_config.eos_token_id if model.generation_config else config.get("eos_token_id")
    ends = [token for token in (ends if isinstance(ends, list) else [ends]) if token is not None]
    start = config.get("bos_token_id")
    return {
        "get_bos_id": start if start is not None else (ends or [0])[0],
        "get_eos_ids": ends or [0],
        "get_max_seq_len": length,
        "get_max_context_len": length,
        "get_n_layers": config["num_hidden_layers"],
        "get_vocab_size": config["vocab_size"],
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def lower(transformer: nn.Module, constants: Mapping[str, Any], length: int) -> tuple[Any, int]:
    """The ExecuTorch program of `forward(tokens (1, T), position (1,)) -> logits (1, V)`, and its XNNPACK linears.

    Only the linears go to XNNPACK: handing it everything else too makes partitioning take far longer and changes no
    weight.
    """
    import executorch.kernels.quantized  # noqa: F401  registers the quantised embedding
    from executorch.backends.xnnpack._passes.convert_to_linear import ConvertToLinearPass
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackDynamicallyQuantizedPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from torch.nn.attention import SDPBackend, sdpa_kernel

    example = (torch.tensor([[2, 3, 4]]), {"input_pos": torch.tensor([0])})
    # One token less than the cache holds, or torch.export specialises the comparison with it.
    shapes = ({1: torch.export.Dim("tokens", max=length - 1)}, {"input_pos": {0: 1}})
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        program = torch.export.export(transformer, example, dynamic_shapes=shapes, strict=True)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackDynamicallyQuantizedPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=dict(constants),
        )
        left = sum("choose_qparams_affine" in str(node.target) for node in edge.exported_program().graph.nodes)
        assert not left, f"XNNPACK left {left} quantised layers to others"
        linears = sum(_count_linears(module) for module in edge.exported_program().graph_module.children())
        lowered = edge.transform([ConvertToLinearPass()]).to_executorch(
            ExecutorchBackendConfig(
                extract_delegate_segments=True,
                do_quant_fusion_and_const_prop=True,  # fuses the int8 embedding into its kernel
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )
    return lowered, linears


def _count_linears(delegate: Any) -> int:
    nodes = delegate.original_module.graph.nodes if hasattr(delegate, "original_module") else ()
    return sum("linear" in str(node.target) for node in nodes)


def checkpoint_digest(folder: Path) -> str:
    """sha256 over the names and contents of a checkpoint's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
