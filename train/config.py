"""RunConfig: every setting of a run, in sections. The attribute docstrings are the help texts; imports no torch.

A new option is a field here and the step that reads it. Checks that concern several fields are in `config_checks`;
reading files and the command line is in `config_loading`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: immutable, no unknown key, no silent conversion ("8" is not 8)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """What is fine-tuned."""

    id: str
    """Hub id, local folder, path/to/file.gguf, or pypi:PACKAGE (a GGUF inside an installed package)."""
    backend: Literal["unsloth", "peft"] = "unsloth"
    """Who trains: unsloth (fast, CPU and CUDA) or peft (plain transformers)."""
    architecture: str | None = None
    """transformers' model_type (qwen3, phi3, smollm3, gemma3_text, llama): what `random` builds."""
    random: Literal["tiny", "full"] | None = None
    """Random weights of `architecture` in place of `id`, offline: tiny, or full = the shape in `shape`."""
    shape: dict[str, Any] = Field(default_factory=dict)
    """Config fields of transformers for random weights, as hidden_size or num_hidden_layers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights while training; auto = bfloat16 on CUDA (under autocast), float32 on CPU. float32 computes in float32."""
    load_in_4bit: bool = False
    """QLoRA: hold the frozen weights in bitsandbytes' 4 bit while training. Not together with `qat` yet."""
    attn_implementation: str | None = None
    """Attention of transformers (sdpa, eager, flash_attention_2); null = its own choice."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the weights. Only for a repository that you have read."""


class DataConfig(Section):
    """What is learned, and what is held out."""

    train: str
    """Hub id, or a local .json, .jsonl, .csv or .parquet file."""
    eval: str | None = None
    """Held-out data, the same kinds; null = split off `train`, never sharing equal rows with it."""
    subset: str | None = None
    """Subset (configuration) of a hub data set."""
    split: str = "train"
    """Split of a hub data set to train on."""
    eval_split: str | None = None
    """Split of a hub data set to evaluate on."""
    format: Literal[
        "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "question_answer", "text", "preference"
    ] = "auto"
    """How the rows look; auto = found by inspection. With train.method=dpo they are preferences."""
    chat_template: str | None = None
    """A packaged template (chatml, ...) or a path to a .jinja file; null = the tokenizer's own."""
    answers_only: bool = True
    """Loss on the answers' tokens only, end of turn included."""
    packing: bool = False
    """Fill each row of `train.max_length` tokens with several samples."""
    train_samples: int | None = Field(default=None, ge=1)
    """Seeded choice of so many training rows; null = all."""
    eval_samples: int = Field(default=200, ge=1)
    """Seeded choice of so many held-out rows."""


class LoraConfig(Section):
    """The adapter, under peft's own names."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapter."""
    lora_alpha: int = Field(default=16, ge=1)
    """The adapter is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Which linears get an adapter: all-linear, a list of last name parts, or a regular expression."""
    target_parameters: list[str] | None = None
    """Fused experts that get an adapter each: [gate_up_proj, down_proj], or longer ends of parameters' names."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA). Not together with `qat` yet."""


class FakeQuantConfig(Section):
    """How `qat` trains. Read only where `qat` is set; docs/RESULTS.md has what each switch gains."""

    placement: Literal["inside", "outside"] = "inside"
    """inside = fake-quantise W + s*B@A, the weight that ships; outside = W alone, as other tools do (to compare)."""
    start: int | float | None = Field(default=None, ge=0)
    """Switch fake quantisation on at this step; a fraction such as 0.2 is a share of all steps, 0 means from the first
    on. null = 0.5, which docs/RESULTS.md found best; but 0 with initial=control and with placement=outside."""
    initial: Literal["base", "control"] = "base"
    """Train the base model, or the finished 16-bit fine-tune further (eval.control): a short QAT phase after it."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps with `qat`; null = as many as `train` says."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate with `qat`; null = train.learning_rate."""
    distill: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that is KL divergence from a 16-bit teacher on the answers: the same model, no second copy."""
    teacher: Literal["start", "control", "base"] = "start"
    """Whom `distill` follows: the run as it was at `start`, the finished 16-bit fine-tune, or the untouched model."""
    ranges: Literal["minmax", "mse"] = "minmax"
    """What the grid of a group spans: its extremes, or less where that has the smaller squared error of the weights."""
    learned_scales: bool = False
    """Learn each group's range too (LSQ); the backward pass then builds each layer's dense gradient."""
    scale_learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the ranges' factors, which start near 1."""
    fused: bool = True
    """On a GPU, compute by fused kernels where a format has some; false = the plain definition, as exact and slower."""
    cache_mib: int = Field(default=1024, ge=0)
    """MiB for fake-quantised weights that are needed again: of frozen layers, of all from one batch to the next with
    gradient accumulation, and from forward to backward where all fit. 0 makes them anew each time."""
    min_coverage: float = Field(default=0.9, ge=0, le=1)
    """Stop where a smaller share of the layers' linear weights can be quantised; what `quantize.skip` keeps is not
    counted."""

    @property
    def starts_at(self) -> int | float:
        """`start`, or what null stands for."""
        if self.start is not None:
            return self.start
        return 0 if self.initial == "control" or self.placement == "outside" else 0.5


class TrainConfig(Section):
    """The optimisation, under TRL's own names (SFTConfig, DPOConfig, GRPOConfig)."""

    method: Literal["sft", "dpo", "grpo"] = "sft"
    """What is learned from: answers (sft), pairs of a better and a worse answer (dpo), or rewards of the model's own
    answers (grpo)."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Highest learning rate."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimiser steps; -1 = as many as num_train_epochs gives."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data, where max_steps is -1."""
    per_device_train_batch_size: int = Field(default=2, ge=1)
    """Rows at once on each device."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches before each optimiser step."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens a row; longer rows are cut."""
    lr_scheduler_type: str = "linear"
    """Schedule of transformers: linear, cosine, constant_with_warmup, ..."""
    warmup_steps: int | float = Field(default=0, ge=0)
    """Steps until the highest learning rate; below 1: a share of all steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 = never."""
    optim: str = "adamw_torch"
    """Optimiser of transformers: adamw_torch, adamw_8bit, ..."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between log lines."""
    save_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints, which `--resume` starts from."""
    report_to: str | list[str] = "none"
    """Other trackers of transformers (tensorboard, mlflow, ...); W&B has `track.wandb`."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Any other field of the method's config in TRL, as --train.extra.neftune_noise_alpha=5."""


class DpoConfig(Section):
    """Direct preference optimisation. Read only where `train.method` is dpo."""

    beta: float = Field(default=0.1, gt=0)
    """How strongly the model is held to the one before fine-tuning."""
    loss_type: str = "sigmoid"
    """TRL's name of the loss: sigmoid (DPO), ipo, hinge, apo_zero, ..."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round."""


class GrpoConfig(Section):
    """Group relative policy optimisation. Read only where `train.method` is grpo."""

    rewards: list[str] = Field(default_factory=lambda: ["exact_match"])
    """What rates an answer: packaged (exact_match, contains_answer, same_number), or Python functions of your own, as
    package.module:function or path/to/file.py:function."""
    reward_weights: list[float] | None = None
    """Weight of each reward in the sum; null = 1 each."""
    num_generations: int = Field(default=8, ge=2)
    """Answers to each prompt, which are compared with each other."""
    max_completion_length: int = Field(default=256, ge=1)
    """Tokens of an answer; longer ones are cut."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the answers that are sampled in training."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the model before fine-tuning; 0 leaves it out."""
    eval_samples: int = Field(default=64, ge=0)
    """Held-out prompts that every arm answers greedily, for its reward; 0 leaves this out."""


class QuantizeConfig(Section):
    """What ships."""

    scheme: str | None = None
    """Numeric format; null = that of `qat`, and without `qat` nothing is quantised."""
    target: str | None = None
    """Where it runs; null = what this machine runs (the accelerator first), else the scheme's first, simulated."""
    group_size: int | None = Field(default=None, ge=1)
    """Weights per scale; null = the scheme's own."""
    skip: list[str] = Field(default_factory=list)
    """Linear layers to leave unquantised: last parts of their names, blocks, or patterns ("down_proj",
    "model.layers.0", "*.layers.[01].*"). `quantize sensitivity` proposes some."""
    algorithm: list[str] = Field(default_factory=list)
    """What chooses the numbers of a run without `qat`: hqq, gptq, awq, ... (`quantize convert --help`), one of a kind;
    [] = round to nearest."""
    calibration: str | None = None
    """Text for the algorithms that look at activations (.jsonl, .txt, .parquet), held-out rows left out; task:NAME, the
    last samples of a benchmark, which its evaluation leaves out; null = the run's own training rows."""
    calibration_samples: int = Field(default=128, ge=1)
    """How many samples of it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the shipped model computes in, scales and unquantised weights included; auto = bfloat16 on CUDA, float32
    on CPU. QAT chooses the integers from the float32 sum W + s*B@A whatever it is."""


class EvalConfig(Section):
    """What is compared at the end."""

    control: bool = False
    """Train a twin without QAT too (doubles the time): what quantisation costs, and how much of it QAT recovers."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once."""
    baseline_cache: bool = True
    """Take the untouched model's scores from an earlier run with the same model, data and settings."""
    tasks: list[str] = Field(default_factory=list)
    """Benchmarks by lm-eval, for every arm: its names, release13 (PyTorch's 13), or .yaml files of your own."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in a task's prompt; null = as the task says."""
    limit: int | None = Field(default=None, ge=1)
    """The first so many samples of each task (of each subtask of a group); null = all."""
    chat_template: bool = False
    """Put the tasks' prompts into the model's chat template."""
    task_batch_size: int | None = Field(default=None, ge=1)
    """Rows at once in tasks; null = found by trying on CUDA, 8 on a CPU. vLLM chooses its own."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the tasks: transformers, or vLLM from an environment of its own (`quantize serve --setup`, or
    $ONGRID_VLLM), for formats that it loads."""

    cost_batches: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1, 8])
    """Sequences at a time for which decoding is timed, unquantised and as shipped; [] = no timing."""

    def task_settings(self, seed: int) -> dict[str, Any] | None:
        """What `quantize.tasks.Settings` takes; None where there are no tasks."""
        if not self.tasks:
            return None
        return {
            "names": list(self.tasks),
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "chat_template": self.chat_template,
            "batch_size": self.task_batch_size,
            "seed": seed,
        }


class TrackConfig(Section):
    """Experiment tracking."""

    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases; offline needs no account."""
    project: str = "ongrid"
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    group: str | None = None
    """W&B group."""
    tags: list[str] = Field(default_factory=list)
    """W&B tags."""


class RunSection(Section):
    """Where the run lives, and its seed."""

    root: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """This run's folder; null = <date>_<config>_<hash>."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the split, the order of rows, the adapter's start values and random weights."""


class RunConfig(Section):
    """Everything that decides a run."""

    qat: str | None = None
    """Quantisation-aware training: the scheme to train for (see `quantize schemes`); null = none."""
    model: ModelConfig
    data: DataConfig
    lora: LoraConfig | None = Field(default_factory=LoraConfig)
    """The adapter; null = full fine-tuning."""
    fake_quant: FakeQuantConfig = Field(default_factory=FakeQuantConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    dpo: DpoConfig = Field(default_factory=DpoConfig)
    grpo: GrpoConfig = Field(default_factory=GrpoConfig)
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    run: RunSection = Field(default_factory=RunSection)

    @property
    def scheme_name(self) -> str | None:
        """The scheme that ships: `quantize.scheme`, else `qat`; None = nothing is quantised."""
        return self.quantize.scheme or self.qat

    def for_qat(self) -> RunConfig:
        """This run's own fine-tuning: with the steps and the learning rate that `fake_quant` asks for."""
        asked = {"max_steps": self.fake_quant.max_steps, "learning_rate": self.fake_quant.learning_rate}
        update = {name: value for name, value in asked.items() if value is not None}
        return self.model_copy(update={"train": self.train.model_copy(update=update)})


def resolved_dict(config: RunConfig) -> dict[str, Any]:
    """Every value, JSON-ready: what config.resolved.json holds, and `load_config` reads back to an equal config."""
    return config.model_dump(mode="json")
