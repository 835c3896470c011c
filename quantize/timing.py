"""How long a causal language model of transformers takes for a prompt and for a decoding step.

The cache has a fixed size. On CUDA the decoder layers are compiled, once for all of them, and what is timed is one CUDA
graph: what an engine does, and what a format can gain without the CPU in its way. On a CPU the model runs as it is.

Shapes: `B` sequences, `T` tokens, `H` heads, `D` their size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

_CALLS = {"cuda": 32, "cpu": 3}
"""Steps in a measurement, by device; a prompt is one."""
_WARM = 2  # measurements that are not counted: clocks rise, caches fill
_LEAST, _MOST = 3, 9
_SECONDS = 5.0  # no measurement begins later, but for the least


class StepTimer:
    """Makes a model ready to be timed, for the length of a `with`; its weights stay as they are.

    Args:
        model: from transformers, on one device, in evaluation mode.
        compiled: compile the decoder layers; only on CUDA.
        calls: decoding steps in a measurement; None = as many as the device makes sensible.

    Raises:
        ValueError: the model's decoder layers cannot be told.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = True, calls: int | None = None) -> None:
        self._model: Any = model
        self._layers = _decoder_layers(model)
        self.device = next(model.parameters()).device
        # Four dimensions: transformers then makes no mask of its own, for which it would ask the GPU. Each layer gets
        # none, which stands for a causal one.
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self.compiled = compiled and self.device.type == "cuda"
        self._calls = calls or _CALLS[self.device.type]
        self._plain = [layer.forward for layer in self._layers]
        self._slots: list[_Slot | None] = [None] * len(self._layers)
        self._rotary: list[_Remembered] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for number, layer in enumerate(self._layers):
            hook = self._own_cache(number)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        modules = self._model.modules()
        self._rotary = [_Remembered(module) for module in modules if type(module).__name__.endswith("RotaryEmbedding")]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            vars(layer).pop("forward", None)
        for rotary in self._rotary:
            rotary.restore()
        if self.compiled:
            torch._dynamo.reset()

    def decode_ms(self, batch: int, context: int) -> float:
        """Median milliseconds of a step: one token for each of `batch` sequences, the last of `context`."""
        return self._median(self.decoding_step(batch, context), self._calls)

    def prefill_ms(self, batch: int, tokens: int) -> float:
        """Median milliseconds for `batch` prompts of so many tokens, until the next token's logits."""
        return self._median(self.prefill(batch, tokens), 1)

    def decoding_step(self, batch: int, context: int) -> Callable[[], Tensor]:
        """What a call of it computes: the logits (B, 1, V) after the last token. Its cache is empty but for that one.

        No mask: a new token looks at the whole cache.
        """
        self._slots = [_Slot(context) for _ in self._layers]
        ids = self._random_ids(batch, 1)
        positions = torch.full((1, 1), context - 1, device=self.device)
        return self._call(ids, positions, _Cached(context - 1))

    def prefill(self, batch: int, tokens: int) -> Callable[[], Tensor]:
        """What a call of it computes: the logits (B, 1, V) after prompts of so many tokens."""
        self._slots = [None] * len(self._layers)
        positions = torch.arange(tokens, device=self.device)[None]
        return self._call(self._random_ids(batch, tokens), positions, None)

    def _random_ids(self, batch: int, tokens: int) -> Tensor:
        words = self._model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(0, words, (batch, tokens), generator=generator).to(self.device)

    def _call(self, ids: Tensor, positions: Tensor, cached: _Cached | None) -> Callable[[], Tensor]:
        for rotary in self._rotary:
            rotary.forget()
        model, mask = self._model, self._mask

        def call() -> Tensor:
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cached, use_cache=False,
                logits_to_keep=1,
            )  # fmt: skip
            logits: Tensor = output.logits
            return logits

        return call

    def _own_cache(self, number: int) -> Callable[..., Any]:
        """Gives a layer the keys and values that are its alone.

        A cache for all layers is told which one asks by its number, and that would compile each layer anew.
        """

        def hook(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
            def own(given: Any) -> Any:
                return self._slots[number] if isinstance(given, _Cached) else None if given is self._mask else given

            return tuple(map(own, arguments)), {name: own(given) for name, given in named.items()}

        return hook

    def _compile(self, wanted: bool) -> None:
        for layer, plain in zip(self._layers, self._plain, strict=True):
            layer.forward = torch.compile(plain, dynamic=False) if wanted else plain

    @torch.inference_mode()
    def _median(self, call: Callable[[], Tensor], calls: int) -> float:
        """Median milliseconds a call; what is slow repeats less."""
        self._compile(False)
        output = call()  # makes the cache, and remembers the rotary embedding
        cuda = self.device.type == "cuda"
        if self.compiled:
            torch._dynamo.reset()  # what was compiled for other shapes
            self._compile(True)
        if cuda:
            with torch._dynamo.config.patch(recompile_limit=64):  # gemma's layers are of two kinds
                call, output = _graph(call)
        times: list[float] = []
        first = time.perf_counter()
        while len(times) < _WARM + _LEAST or (len(times) < _WARM + _MOST and time.perf_counter() - first < _SECONDS):
            times.append(_on_cuda(call, calls) if cuda else _on_cpu(call, calls))
        assert bool(output.isfinite().all()), "a step gave no numbers"
        return statistics.median(times[_WARM:])


class _Cached:
    """Stands for the cache outside the layers."""

    def __init__(self, length: int) -> None:
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this step's."""
        return self._length


class _Slot:
    """The keys and values (B, H, T, D) of one layer; the newest token takes the last place."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.last: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """What attention calls with the newest token's (B, H, 1, D)."""
        if self.keys is None or self.values is None or self.last is None:
            self.keys, self.values = (
                torch.randn_like(given[:, :, :1]).repeat(1, 1, self.context, 1) for given in (keys, values)
            )
            self.last = torch.tensor([self.context - 1], device=keys.device)
        return self.keys.index_copy_(2, self.last, keys), self.values.index_copy_(2, self.last, values)


class _Remembered:
    """A rotary embedding that computes once: its positions stay, and longrope reads them back from the GPU."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._plain = module, module.forward
        self._known: dict[tuple[Any, ...], Any] = {}
        module.forward = self._forward

    def _forward(self, *arguments: Any, **named: Any) -> Any:
        kind = tuple(given for given in (*arguments, *named.values()) if not isinstance(given, Tensor))
        if kind not in self._known:  # "sliding_attention" beside "full_attention"
            self._known[kind] = self._plain(*arguments, **named)
        return self._known[kind]

    def forget(self) -> None:
        """Before positions change."""
        self._known.clear()

    def restore(self) -> None:
        """Gives the module its own back."""
        del self._module.forward


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"{type(model).__name__} holds its decoder layers in a way that is not known here")


def _graph(step: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """(what replays a step without the CPU, its output)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


def _on_cuda(call: Callable[[], Any], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / calls


def _on_cpu(call: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return 1000 * (time.perf_counter() - began) / calls
