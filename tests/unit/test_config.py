"""RunConfig: loading, overriding, and every error a config can have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from quantize.errors import UserError
from train.config import RunConfig, Section, resolved_dict
from train.config_checks import find_problems
from train.config_loading import HOME, find_config, load_config
from train.config_values import section_of
from train.trl_fields import trl_fields

MINIMAL = "model:\n  id: some/model\ndata:\n  train: some/data\n"
RANDOM = ["--model.random=full", "--model.architecture=qwen3"]
PACKAGED = sorted(path.name for path in (HOME / "configs").glob("*.yaml"))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(MINIMAL)
    return path


def write(folder: Path, text: str, name: str = "my.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def errors_of(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return list(caught.value.lines)


def value_at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


class TestModels:
    def test_defaults(self, config_file: Path) -> None:
        config = load_config(config_file)
        assert config.qat is None
        assert config.scheme_name is None
        assert config.lora is not None
        assert config.lora.r == 16
        assert config.train.learning_rate == 2e-4

    def test_frozen(self, config_file: Path) -> None:
        with pytest.raises(ValidationError):
            load_config(config_file).train.max_steps = 3  # type: ignore[misc]

    def test_every_field_has_a_help_text(self) -> None:
        def walk(section: type[BaseModel], path: str) -> list[str]:
            bare = []
            for name, field in section.model_fields.items():
                below = section_of(field.annotation)
                if below is not None:
                    bare += walk(below, f"{path}{name}.")
                elif not field.description:
                    bare.append(path + name)
            return bare

        assert walk(RunConfig, "") == []
        assert all(section.__doc__ for section in Section.__subclasses__())

    def test_scheme_name(self, config_file: Path) -> None:
        assert load_config(config_file, ["--qat=int4"]).scheme_name == "int4"
        assert load_config(config_file, ["--quantize.scheme=fp8"]).scheme_name == "fp8"
        assert load_config(config_file, ["--qat=int4", "--quantize.scheme=int4"]).scheme_name == "int4"


class TestFindConfig:
    @pytest.mark.parametrize("name", PACKAGED)
    def test_packaged_with_and_without_ending(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert find_config(name) == find_config(name.removesuffix(".yaml")) == HOME / "configs" / name

    def test_a_path_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path, MINIMAL, "tiny.yaml")
        assert load_config("tiny.yaml").model.id == "some/model"

    def test_missing(self) -> None:
        (line,) = errors_of("sft_qwen33.yaml")
        assert "did you mean sft_qwen3.yaml?" in line
        assert all(name in line for name in PACKAGED)

    def test_a_run_folder(self, tmp_path: Path) -> None:
        write(tmp_path, "{}", "config.resolved.json")
        (line,) = errors_of(tmp_path)
        assert f"--config {tmp_path / 'config.resolved.json'}" in line
        assert f"--resume {tmp_path}" in line


class TestShippedConfigs:
    @pytest.mark.parametrize("name", PACKAGED)
    @pytest.mark.parametrize("qat", ["int8-int4", "int8-int4-mobile", "int4", "fp8", "None"])
    def test_loads_for_every_scheme(self, name: str, qat: str) -> None:
        config = load_config(name, [f"--qat={qat}"])
        assert config.qat == (None if qat == "None" else qat)

    @pytest.mark.parametrize("name", PACKAGED)
    def test_can_be_random(self, name: str) -> None:
        assert load_config(name, ["--model.random=tiny"]).model.architecture

    @pytest.mark.parametrize("name", PACKAGED)
    def test_opens_with_its_command(self, name: str) -> None:
        first = (HOME / "configs" / name).read_text().splitlines()[0]
        assert first == f"# train --config {name} --qat int8-int4"

    def test_packaged_data_is_found_from_anywhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        config = load_config("tiny.yaml")
        assert Path(config.data.train) == HOME / "examples/data/reasoning_train.jsonl"
        monkeypatch.chdir(HOME)
        assert load_config("tiny.yaml").data.train == "examples/data/reasoning_train.jsonl"


class TestOverrides:
    @pytest.mark.parametrize(
        ("words", "key", "value"),
        [
            (["--qat", "int8-int4"], "qat", "int8-int4"),
            (["--qat=None"], "qat", None),
            (["--qat=null"], "qat", None),
            (["--lora=None"], "lora", None),
            (["--lora.r=8"], "lora.r", 8),
            (["--lora={'r': 4, 'use_rslora': True}"], "lora.use_rslora", True),
            (['--lora={"r": 4}'], "lora.r", 4),
            (["--lora=None", "--lora.r=4"], "lora.r", 4),
            (["--train.learning_rate=0.0002"], "train.learning_rate", 2e-4),
            (["--train.learning-rate=1e-3"], "train.learning_rate", 1e-3),
            (["--train.learning_rate", "1E-3"], "train.learning_rate", 1e-3),
            (["--train.learning_rate=1"], "train.learning_rate", 1.0),
            (["--train.max_steps", "-1"], "train.max_steps", -1),
            (["--train.max_steps=8.0"], "train.max_steps", 8),
            (["--train.max_steps=4", "--train.max-steps=8"], "train.max_steps", 8),
            (["--eval.control=True"], "eval.control", True),
            (["--eval.control=false"], "eval.control", False),
            (["--eval.control"], "eval.control", True),
            (["--eval.control", "False"], "eval.control", False),
            (["--fake_quant.start=5"], "fake_quant.start", 5),
            (["--fake-quant.start=0.25"], "fake_quant.start", 0.25),
            (["--fake-quant.start=None"], "fake_quant.start", None),
            (["--model.random=None"], "model.random", None),
            (["--model.revision=123"], "model.revision", "123"),
            (["--run.name=2026-11-24"], "run.name", "2026-11-24"),
            (["--run.name='1e3'"], "run.name", "1e3"),
            (["--track.wandb=off"], "track.wandb", "off"),
            (["--track.tags=['a','b']"], "track.tags", ["a", "b"]),
            (['--track.tags=["a", "b"]'], "track.tags", ["a", "b"]),
            (["--track.tags=a,b"], "track.tags", ["a", "b"]),
            (["--track.tags=a"], "track.tags", ["a"]),
            (["--track.tags=[]"], "track.tags", []),
            (["--track.tags", "a", "b", "--qat=None"], "track.tags", ["a", "b"]),
            (["--lora.target_modules=all-linear"], "lora.target_modules", "all-linear"),
            (["--lora.target_modules=q_proj,v_proj"], "lora.target_modules", ["q_proj", "v_proj"]),
            (["--train.report_to=['tensorboard']"], "train.report_to", ["tensorboard"]),
            (["--train.extra.neftune_noise_alpha=5"], "train.extra.neftune_noise_alpha", 5),
            (["--train.extra.adam_beta2=0.95"], "train.extra.adam_beta2", 0.95),
            (["--train.extra.group_by_length=True"], None, None),
            (['--train.extra={"adam_beta2": 0.9, "eos_token": null}'], "train.extra.eos_token", None),
            (["--train.extra.eos_token=None"], "train.extra.eos_token", None),
            ([*RANDOM, "--model.shape.hidden_size=64"], "model.shape", {"hidden_size": 64}),
        ],
    )  # fmt: skip
    def test_forms(self, config_file: Path, words: list[str], key: str | None, value: Any) -> None:
        if key is None:  # a field that transformers 5 no longer has
            assert "no field of trl's SFTConfig" in errors_of(config_file, *words)[0]
            return
        found = value_at(load_config(config_file, words), key)
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ("words", "first"),
        [
            ([], 0.5),
            (["--fake_quant.start=0"], 0),
            (["--fake_quant.start=3"], 3),
            (["--fake_quant.placement=outside"], 0),
            (["--fake_quant.initial=control", "--eval.control=True"], 0),
            (["--fake_quant.initial=control", "--eval.control=True", "--fake_quant.start=0.2"], 0.2),
        ],
    )
    def test_qat_starts_half_way_unless_something_else_is_asked(
        self, config_file: Path, words: list[str], first: float
    ) -> None:
        assert load_config(config_file, ["--qat=int4", *words]).fake_quant.starts_at == first

    def test_other_values_stay(self, tmp_path: Path) -> None:
        path = write(tmp_path, MINIMAL + "train: {max_steps: 5, learning_rate: 1e-4}\nlora: {r: 4, lora_alpha: 8}\n")
        config = load_config(path, ["--train.max_steps=7", "--lora={'r': 2}"])
        assert (config.train.max_steps, config.train.learning_rate) == (7, 1e-4)
        assert config.lora is not None
        assert (config.lora.r, config.lora.lora_alpha) == (2, 8)

    def test_options_can_give_what_the_file_lacks(self, tmp_path: Path) -> None:
        path = write(tmp_path, "model: {id: x}\nlora: null\n")
        config = load_config(path, ["--data.train=y", "--lora.r=2"])
        assert config.data.train == "y"
        assert config.lora is not None


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "key", "value"),
        [
            ("train: {learning_rate: 1e-3}", "train.learning_rate", 1e-3),
            ("train: {max_steps: 1_000}", "train.max_steps", 1000),
            ("train: {max_steps: 010}", "train.max_steps", 10),
            ("track: {wandb: off}", "track.wandb", "off"),
            ("qat: None", "qat", None),
            ("qat: ~", "qat", None),
            ("run: {name: 2026-11-24}", "run.name", "2026-11-24"),
            ("run: {name: 'None'}", "run.name", "None"),
            ("eval: {control: True}", "eval.control", True),
            ("train:\n", "train.max_steps", -1),
            ("lora:\n", "lora", None),
            ("track: {tags: [a, b]}", "track.tags", ["a", "b"]),
        ],
    )
    def test_scalars(self, tmp_path: Path, text: str, key: str, value: Any) -> None:
        found = value_at(load_config(write(tmp_path, MINIMAL + text)), key)
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize(
        ("text", "line", "words"),
        [
            ("model: [1, 2", 1, "malformed YAML"),
            (MINIMAL + "train: {a: 1\n", 6, "malformed YAML"),
            (MINIMAL + "data:\n  train: x\n", 5, "`data` is given twice"),
            (MINIMAL + "train:\n  max_steps: 1\n  max_steps: 2\n", 7, "`max_steps` is given twice"),
            (MINIMAL + "run: {name: !!python/name:os.system }\n", 5, "python"),
            ("? [a, b]\n: c\n", 1, "a key must be a word"),
        ],
    )
    def test_malformed(self, tmp_path: Path, text: str, line: int, words: str) -> None:
        path = write(tmp_path, text)
        (message,) = errors_of(path)
        assert message.startswith(f"{path}:{line}: ")
        assert words in message

    @pytest.mark.parametrize(("text", "words"), [("", "is empty"), ("# only this", "is empty"), ("- 1", "holds [1]")])
    def test_no_mapping(self, tmp_path: Path, text: str, words: str) -> None:
        assert words in errors_of(write(tmp_path, text))[0]

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "model.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "not UTF-8 text" in errors_of(path)[0]


class TestResolved:
    @pytest.mark.parametrize("name", PACKAGED)
    def test_round_trip(self, name: str, tmp_path: Path) -> None:
        config = load_config(name, ["--qat=int8-int4", "--train.extra.neftune_noise_alpha=5", "--fake_quant.start=0.0"])
        path = write(tmp_path, json.dumps(resolved_dict(config)), "config.resolved.json")
        again = load_config(path)
        assert again == config
        assert json.dumps(resolved_dict(again)) == json.dumps(resolved_dict(config))

    def test_malformed(self, tmp_path: Path) -> None:
        path = write(tmp_path, '{"model":\n 1,}', "config.resolved.json")
        assert errors_of(path)[0].startswith(f"{path}:2: malformed JSON")
        path = write(tmp_path, '{"qat": "a", "qat": "b"}', "config.resolved.json")
        assert "`qat` is given twice" in errors_of(path)[0]


class TestErrors:
    def test_unknown_key(self, tmp_path: Path) -> None:
        path = write(tmp_path, MINIMAL + "train:\n  learning_rat: 1\n")
        assert errors_of(path) == [f"unknown key `train.learning_rat` in {path}:6; did you mean `train.learning_rate`?"]

    @pytest.mark.parametrize(
        ("option", "meant"),
        [
            ("--train.learning-rat=1", "train.learning_rate"),
            ("--learning_rate=1", "train.learning_rate"),
            ("--train.seed=1", "run.seed"),
            ("--qta=int4", "qat"),
            ("--quantise.scheme=int4", "quantize.scheme"),
            ("--lora.rank=4", None),
            ("--xyz=1", None),
        ],
    )
    def test_unknown_option(self, config_file: Path, option: str, meant: str | None) -> None:
        (line,) = errors_of(config_file, option)
        assert line.startswith(f"unknown option {option.partition('=')[0]}; ")
        if meant:
            assert line.endswith(f"did you mean --{meant}?")

    @pytest.mark.parametrize(
        ("option", "expected"),
        [
            ("--train.max_steps=abc", "a whole number >= -1"),
            ("--train.max_steps=1.5", "a whole number >= -1"),
            ("--train.learning_rate=fast", "a number > 0"),
            ("--train.learning_rate=0", "a number > 0"),
            ("--train.learning_rate=nan", "a number > 0"),
            ("--eval.control=perhaps", "true or false"),
            ("--model.dtype=float3", "one of auto, float32, bfloat16; did you mean float32?"),
            ("--model.random=3", "one of tiny, full, or null"),
            ("--data.train_samples=0", "a whole number >= 1, or null"),
            ("--data.eval_samples=0", "a whole number >= 1"),
            ("--fake_quant.start=-1", "a number >= 0, or null"),
            ("--lora.lora_dropout=1", "a number >= 0 and < 1"),
            ("--lora=5", "a section with keys, or null"),
            ("--train=5", "a section with keys"),
            ("--train.extra=5", "keys with values"),
        ],
    )
    def test_wrong_value_names_the_option_as_typed(self, config_file: Path, option: str, expected: str) -> None:
        assert errors_of(config_file, option) == [f"{option}: expected {expected}"]

    def test_wrong_value_in_the_file(self, tmp_path: Path) -> None:
        path = write(tmp_path, MINIMAL + 'train:\n  max_steps: "60"\n')
        assert errors_of(path) == [f'`train.max_steps` in {path}:6 is "60"; expected a whole number >= -1']
        path = write(tmp_path, MINIMAL + "track:\n  tags: [1]\n")
        assert errors_of(path) == [f"`track.tags` in {path}:6 is [1]; expected a list of texts"]
        path = write(tmp_path, MINIMAL + "train:\n  report_to: 3\n")
        assert errors_of(path) == [f"`train.report_to` in {path}:6 is 3; expected text or a list of texts"]
        path = write(tmp_path, MINIMAL + "train:\n  extra: {1: 2}\n")
        assert "train.extra.1 is no field" in errors_of(path)[0]

    def test_missing_keys(self, tmp_path: Path) -> None:
        path = write(tmp_path, "qat: int4\n")
        lines = errors_of(path)
        assert lines == [
            f"`model.id` is missing in {path}; expected text; or give --model.id=...",
            f"`data.train` is missing in {path}; expected text; or give --data.train=...",
        ]

    @pytest.mark.parametrize("words", [["train.max_steps=3"], ["-x"], ["--"], ["--train.max_steps"], ["--qat.foo=1"]])
    def test_no_option(self, config_file: Path, words: list[str]) -> None:
        assert words[0].split("=")[0] in errors_of(config_file, *words)[0]

    def test_all_at_once(self, tmp_path: Path) -> None:
        path = write(tmp_path, "model:\n  id: 3\ndata:\n  train: x\n  foo: 1\ntrain:\n  max_steps: soon\n")
        words = ["--qat=int4", "--quantize.scheme=fp8", "--eval.batch_size=0", "--train.extra.learning_rate=1", "oops"]
        lines = errors_of(path, *words)
        wanted = ["`model.id`", "data.foo", "`train.max_steps`", "quantize.scheme=fp8", "--eval.batch_size=0"]
        for part in [*wanted, "use train.learning_rate", "unexpected argument 'oops'"]:
            assert any(part in line for line in lines), part
        assert len(lines) == 7
        assert all("\n" not in line for line in lines)


class TestContradictions:
    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["--qat=int8-int4", "--quantize.scheme=fp8"], ["qat=int8-int4", "quantize.scheme=fp8", "--qat=int8-int4"]),
            (["--qat=int8int4"], ["unknown scheme", "did you mean int8-int4?", "fp8"]),
            (["--quantize.scheme=nf4"], ["quantize.scheme: unknown scheme", "int8-int4"]),
            (["--qat=fp8", "--quantize.target=cpu"], ["quantize.target=cpu", "cuda-sm89"]),
            (["--qat=int4", "--quantize.target=tpu"], ["quantize.target=tpu", "cuda-sm80", "cpu"]),
            (["--qat=int4", "--quantize.group_size=48"], ["quantize.group_size=48", "32, 64, 128, 256"]),
            (["--qat=fp8", "--quantize.group_size=32"], ["not offered by fp8", "per output row"]),
            (["--quantize.group_size=32"], ["quantize.group_size=32", "without a scheme"]),
            (["--quantize.skip=[\"lm_head\"]"], ["quantize.skip=", "without a scheme"]),
            (["--quantize.target=cpu"], ["quantize.target=cpu", "without a scheme"]),
            (["--qat=int4", "--quantize.dtype=float32"], ["int4 needs quantize.dtype=bfloat16"]),
            (["--qat=int4", "--model.load_in_4bit=True"], ["load_in_4bit", "not supported together with qat yet"]),
            (["--lora=None", "--model.load_in_4bit=True"], ["load_in_4bit", "set `lora`"]),
            (["--model.random=tiny"], ["model.random=tiny needs model.architecture", "qwen3"]),
            (["--model.random=full", "--model.architecture=qwen3"], ["model.random=full needs model.shape"]),
            (["--model.shape.hidden_size=8"], ["model.shape is read only with model.random"]),
            (["--model.id=random"], ["model.id=random needs model.random"]),
            (["--fake_quant.start=1.5"], ["no fraction below 1"]),
            (["--fake_quant.start=1.0"], ["no fraction below 1", "write 1 for a step"]),
            (["--qat=int4", "--fake_quant.start=9", "--train.max_steps=9"], ["never reached"]),
            (["--qat=int4", "--lora=None", "--fake_quant.placement=outside"], ["fake_quant.placement", "lora=null"]),
            (
                ["--qat=int4", "--lora.use_dora=True", "--model.backend=peft"],
                ["lora.use_dora is not supported together with qat yet"],
            ),
            (
                ["--qat=int4", "--fake_quant.distill=0.5", "--fake_quant.start=0"],
                ["teacher=start", "start=0", "teacher=control"],
            ),
            (
                ["--qat=int4", "--fake_quant.distill=0.5", "--fake_quant.teacher=control"],
                ["fake_quant.teacher=control", "eval.control=true"],
            ),
            (["--qat=int4", "--fake_quant.initial=control"], ["fake_quant.initial=control", "eval.control=true"]),
            (
                ["--qat=int4", "--fake_quant.initial=control", "--eval.control=True", "--lora=None"],
                ["fake_quant.initial=control", "set `lora`"],
            ),
            (
                ["--qat=int4", "--fake_quant.distill=0.5", "--fake_quant.teacher=base", "--lora=None"],
                ["fake_quant.distill", "second copy", "set `lora`"],
            ),
            (
                ["--qat=int4", "--fake_quant.distill=0.5", "--fake_quant.teacher=base", "--data.packing=True"],
                ["fake_quant.distill", "data.packing=false"],
            ),
            (
                ["--qat=int4", "--fake_quant.placement=outside", "--fake_quant.learned_scales=True"],
                ["fake_quant.placement=outside", "learned_scales=false"],
            ),
            (
                ["--qat=int4", "--fake_quant.placement=outside", "--fake_quant.ranges=mse"],
                ["fake_quant.placement=outside", "ranges=minmax"],
            ),
            (
                ["--qat=int4", "--fake_quant.start=4", "--fake_quant.max_steps=4", "--train.max_steps=9"],
                ["never reached", "fake_quant.max_steps=4"],
            ),
            (["--train.max_steps=0"], ["train.max_steps=0", "quantize convert"]),
            (["--train.max_steps=5", "--train.warmup_steps=6"], ["train.warmup_steps=6", "train.max_steps=5"]),
            (["--train.report_to=wandb", "--track.wandb=offline"], ["train.report_to", "track.wandb"]),
            (["--lora.target_modules=q_proj"], ["fits none", "['q_proj']"]),
            (["--lora.target_modules=.*["], ["no regular expression"]),
            (["--run.name=a/b"], ["run.name", "run.root"]),
            (["--run.name=.."], ["run.name"]),
            (["--model.id="], ["model.id is empty"]),
            (["--data.train="], ["data.train is empty"]),
            (["--train.extra.learning_rate=1"], ["train.extra.learning_rate", "use train.learning_rate"]),
            (["--train.extra.packing=True"], ["use data.packing"]),
            (["--train.extra.neftune_noise=1"], ["did you mean train.extra.neftune_noise_alpha?"]),
            (["--train.extra.learning_rat=1"], ["did you mean train.learning_rate?"]),
            (["--train.optim=adamw"], ["train.optim=adamw", "adamw_torch"]),
            (["--train.lr_scheduler_type=cosin"], ["did you mean cosine?"]),
        ],
    )  # fmt: skip
    def test_refused(self, config_file: Path, words: list[str], parts: list[str]) -> None:
        lines = errors_of(config_file, *words)
        assert len(lines) == 1, lines
        for part in parts:
            assert part in lines[0]
        assert any(word in lines[0] for word in words), "the line names an option as typed"

    @pytest.mark.parametrize(
        "words",
        [
            ["--model.load_in_4bit=True"],
            ["--model.load_in_4bit=True", "--quantize.scheme=int8-int4"],
            ["--lora=None", "--qat=int8-int4"],
            ["--qat=int4", "--fake_quant.placement=outside", "--lora.lora_dropout=0.1"],
            ["--qat=int4", "--lora.lora_dropout=0.1"],
            ["--qat=int4", "--quantize.target=cpu", "--quantize.dtype=float32"],
            ["--qat=int4", "--fake_quant.distill=0.5", "--fake_quant.start=0.5"],
            ["--qat=int4", "--fake_quant.distill=0.5"],
            ["--qat=int4", "--fake_quant.distill=1.0", "--fake_quant.teacher=base"],
            ["--qat=int4", "--fake_quant.distill=0.5", "--fake_quant.teacher=control", "--eval.control=True"],
            ["--qat=int4", "--fake_quant.distill=0.5", "--fake_quant.initial=control", "--eval.control=True"],
            ["--qat=int4", "--fake_quant.learned_scales=True", "--fake_quant.ranges=mse"],
            ["--fake_quant.distill=0.5"],
            ["--lora.use_dora=True", "--model.backend=peft"],
            ["--fake_quant.start=0.99"],
            ["--train.report_to=wandb"],
            ["--train.optim=adamw_8bit", "--train.lr_scheduler_type=constant_with_warmup"],
            ["--train.warmup_steps=0.1", "--train.max_steps=5"],
            ["--qat=int4", "--quantize.dtype=bfloat16", "--quantize.target=cuda-sm80", "--quantize.group_size=64"],
        ],
    )
    def test_allowed(self, config_file: Path, words: list[str]) -> None:
        load_config(config_file, words)

    def test_built_in_python(self) -> None:
        config = RunConfig.model_validate(
            {"qat": "nf4", "model": {"id": "x"}, "data": {"train": "y"}, "train": {"extra": {"a": 1}}}
        )
        texts = [problem.text for problem in find_problems(config)]
        assert len(texts) == 2
        assert any("train.extra.a" in text for text in texts)

    def test_sft_fields_are_those_of_the_installed_trl(self) -> None:
        assert {"learning_rate", "packing", "neftune_noise_alpha", "eos_token", "adam_beta2"} <= trl_fields("sft")
        assert not {name for name in trl_fields("sft") if name.startswith("_")}
