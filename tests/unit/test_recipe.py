"""The recipe room: what is read, what is refused and in which words, what follows from a recipe."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from key_tables import reference
from ruamel.yaml import YAML

from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder
from edgedisp.recipe import Dispersion, Recipe, load
from edgedisp.recipe.load import REMOVED
from edgedisp.recipe.recipe import smoke
from edgedisp.recipe.values import LAYER_NAMES, Variant, read_number, read_whole

SMALL = """\
name: small
model:
  base: org/name
data:
  train:
    - source: text.txt
  context: 64
train:
  tokens: 10k
  lr: 1e-4
"""
Reader = Callable[..., Recipe]
Refusal = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    """Load a text as tmp_path/r.yaml."""

    def reader(text: str, *overrides: str, smoke: bool = False) -> Recipe:
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return load(tmp_path / "r.yaml", overrides, smoke)

    return reader


@pytest.fixture
def refusal(read: Reader, tmp_path: Path) -> Refusal:
    """The message for a text that must be refused, with the folder cut off."""

    def refuse(text: str, *overrides: str, smoke: bool = False) -> str:
        with pytest.raises(BadInput) as caught:
            read(text, *overrides, smoke=smoke)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refuse


def with_line(line: str) -> str:
    """SMALL with a line put at the end, which is inside `train` if it is indented: line 11."""
    return SMALL + line + "\n"


# ---------------------------------------------------------------- what is read


def test_defaults_are_those_of_the_paper_and_the_contract(read: Reader) -> None:
    recipe, dispersion = read(SMALL), Dispersion()
    assert (recipe.train.betas, recipe.train.weight_decay, recipe.train.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert recipe.train.dispersion == dispersion and recipe.train.schedule == "cosine"
    assert (dispersion.variant, dispersion.weight, dispersion.layers) == ("angular", 0.1, "all")
    assert [arm.name for arm in recipe.arms] == ["baseline", "dispersed"] and recipe.seeds == 1


@given(st.integers(-(10**14), 10**14))
def test_every_spelling_of_a_whole_number_gives_it_back(number: int) -> None:
    for spelling in (number, str(number), f"{number:_}", f"{number}.0", f"{number * 1000}e-3", f" {number} "):
        assert read_whole(spelling) == number
    assert read_whole(f"{number}k") == read_whole(f"{number}e3") == 1000 * number
    assert (read_whole("1.5B"), read_whole("+0.5k"), read_whole("300 k")) == (1_500_000_000, 500, 300_000)


@given(st.one_of(st.text(max_size=60), st.text(alphabet="0123456789_.eE+-kKMB% ", max_size=50)))
def test_any_other_text_is_no_number_or_a_finite_one(text: str) -> None:
    for reader in (read_whole, read_number):
        with contextlib.suppress(ValueError):  # the only failure there may be
            assert abs(reader(text)) < float("inf")


def test_what_is_no_number_is_refused() -> None:
    for value in (True, None, [], {}, float("nan"), float("inf"), "", "k", "0x10", "١٠", "1e999", "3 apples"):
        for reader in (read_whole, read_number):
            with pytest.raises(ValueError):
                reader(value)


def test_aliases_are_followed_and_a_byte_order_mark_is_ignored(read: Reader) -> None:
    text = "\ufeff" + SMALL.replace("10k", "&n 10k") + "verify: {tokens: *n}\n"
    text += "arms: [{name: x, dispersion: &d {weight: 2}}, {name: y, neftune: 3, dispersion: *d}]\n"
    recipe = read(text, "arms.0.dispersion.weight=3")
    assert recipe.verify.tokens == recipe.train.tokens == 10_000
    assert [arm.dispersion and arm.dispersion.weight for arm in recipe.arms] == [3, 2]


def test_an_adapter_resolves_alpha_and_base(read: Reader) -> None:
    qlora = read(with_line("  adapter: {kind: qlora, rank: 8}")).train.adapter
    lora = read(with_line("  adapter: {kind: lora}")).train.adapter
    assert qlora is not None and lora is not None
    assert (qlora.alpha, qlora.base, lora.alpha, lora.base) == (16, "nf4", 32, None)


# ---------------------------------------------------------------- overrides


def test_overrides_reach_every_kind_of_key(read: Reader) -> None:
    overrides = "train.tokens=20k arms=[baseline] train.dispersion=null data.train.0.limit=10 "
    overrides += "train.adapter.kind=lora model.base=pypi:name==1.0/file.gguf train.tokens=30k"
    recipe = read(SMALL, *overrides.split())
    assert recipe.train.tokens == 30_000 and recipe.data.train[0].limit == 10
    assert [arm.name for arm in recipe.arms] == ["baseline"] and recipe.train.dispersion is None
    assert recipe.train.adapter is not None and recipe.train.adapter.rank == 16
    assert recipe.model.base == "pypi:name==1.0/file.gguf"


FAULTY_OVERRIDES = """\
train.tokens=abc | train.tokens: needs a whole number
train.tokns=5 | train.tokns: unknown key; did you mean 'tokens'?
train.tokens= | train.tokens: needs a whole number here, or a number for train.epochs
train.tokens | needs key=value, such as train.tokens=10k
train..lr=3 | needs key=value, such as train.tokens=10k
train.tokens.x=3 | train.tokens.x: '10k' has no keys
data.train.3.limit=9 | data.train.3.limit: the list has no item '3'
train.adapter.rank=4 | train.adapter.kind: missing
name=12 | name: Input should be a valid string (found 12); put it in quotes
train.dispersion=null | train.dispersion: null, but the arm 'dispersed' needs it
train.lr=[1 | train.lr: not YAML
train.lr=&a [*a] | train.lr: needs a number
train.lr=!!python/name:os.system | train.lr: not YAML: could not determine a constructor
"""


def test_a_faulty_override_is_reported_as_such(refusal: Refusal) -> None:
    for row in FAULTY_OVERRIDES.splitlines():
        override, words = row.split(" | ")
        message = refusal(SMALL, override)
        assert message.startswith(f"--set {override}: {words}") and "\n" not in message, row


# ---------------------------------------------------------------- refusals of keys


def test_all_faults_are_reported_at_once_in_the_order_of_the_file(refusal: Refusal) -> None:
    text = (
        SMALL.replace("context: 64", "contxt: 64")
        .replace("tokens: 10k", "tokens: -5")
        .replace("lr: 1e-4", "lr: fast")
    )
    lines = refusal(text + "arms: [baseline, disperse]\n", "seed=-1", "nam=x").splitlines()
    assert lines[0] == "r.yaml: 7 problems"
    assert [re.match(r"  \d\. ((?:--set )?\S+: \S+): ", line).group(1) for line in lines[1:]] == [  # type: ignore[union-attr]
        "r.yaml:4: data.context", "r.yaml:7: data.contxt", "r.yaml:9: train.tokens", "r.yaml:10: train.lr",
        "r.yaml:11: arms.1", "--set seed=-1: seed", "--set nam=x: nam",
    ]  # fmt: skip


# Put on line 11 (indented: inside `train`) | the key reported | what a user acts on
FAULTS = """\
  batch: 2.5 | train.batch | needs a whole number
  batch: 200m | train.batch | such as 40, 40k or 200M
  batch: 1,000 | train.batch | write it without commas
  batch: 1e30 | train.batch | too large
  clip: .inf | train.clip | needs a number, such as 0.1
  clip: 0 | train.clip | greater than 0
  warmup: 150% | train.warmup | less than 1
latency: {pause_s: 1e300} | latency.pause_s | less than or equal to 3600
  adapter: {kind: lora, rank: 1e17} | train.adapter.rank | less than or equal to 8192
  quantization_aware: int5 | train.quantization_aware | int8, int4, or a mapping
  dispersion: {layers: lastt} | train.dispersion.layers | did you mean 'last'?
  dispersion: {tokens: 1} | train.dispersion.tokens | at least 2
  dispersion: on | train.dispersion | needs a mapping with variant, weight, on
  adapter: {rank: 4} | train.adapter.kind | missing
  distributed: {fsdp: full_shard, wrap: all} | train.distributed.wrap | auto, or a list
  precision: BF16 | train.precision | did you mean 'bf16'?
  gradient_checkpointing: yes | train.gradient_checkpointing | boolean
arms: [] | arms | at least 1 item
arms: [{name: a, neftune: 1}, {name: A, neftune: 2}] | arms | 'A' is listed twice
arms: [{name: x}] | arms.0 | names no technique
arms: [{name: x, dispersion: {weigth: 3}}] | arms.0.dispersion.weigth | did you mean 'weight'?
arms: [{name: baseline, neftune: 3}] | arms.0 | 'baseline' adds nothing
arms: [{name: a/b, neftune: 3}] | arms.0.name | needs 1 to 60 letters
arms: [{name: Items, neftune: 3}] | arms.0.name | choose another
arms: [{name: x, active_forgetting: aut}] | arms.0.active_forgetting | needs a whole number
arms: [{name: x, active_forgetting: 39}] | arms.0 | drawn anew every 39 steps, but the run has 39
quantize: {int4: {group: 100}} | quantize.int4.group | 16, 32, 64, 128 or 256
evaluate: {tasks: [held_out_cloze]} | evaluate.tasks.0 | did you mean 'heldout_cloze'?
targets: [laptop] | targets.0 | did you mean 'laptop-x64'?
  weight: 0.2 | train.weight | did you mean 'train.dispersion.weight'?
"a\\nb\\e[1m": 3 | a\\nb\\x1b[1m | unknown key; the keys are
seed: !!set {a, b} | seed | needs a whole number
seed: 4294967295 | seed | less than or equal to 2147483648
"""


def test_a_faulty_key_is_reported_with_line_path_and_cure(refusal: Refusal) -> None:
    for row in FAULTS.splitlines():
        line, key, words = row.split(" | ")
        message = refusal(with_line(line))
        assert message.startswith(f"r.yaml:11: {key}: ") and words in message and "\n" not in message, row


# In SMALL | put instead of it (~: a line break) | line and key reported
FAULTY_PARTS = """\
context: 64 | context: 64~  heldout: 100% | 8: data.heldout
  context: 64~ |  | 4: data.context
    - source: text.txt |     [] | 5: data.train
    - source: text.txt |     source: text.txt | 5: data.train
- source: text.txt | - text: x | 6: data.train.0.source
text.txt | text.txt~      sha256: beef | 7: data.train.0.sha256
org/name | 'org/name ' | 3: model.base
name: small | name: ../up | 1: name
name: small~ |  | 1: name
model:~  base: org/name~ | model: org/name~ | 2: model
10k | 1000~  accumulate: 8 | 9: train.tokens
"""


def test_a_faulty_required_or_repeated_key_too(refusal: Refusal) -> None:
    for row in FAULTY_PARTS.splitlines():
        old, new, place = row.replace("~", "\n").split(" | ")
        message = refusal(SMALL.replace(old, new))
        assert old in SMALL and message.startswith(f"r.yaml:{place}: ") and "\n" not in message, row


def test_a_removed_key_is_answered_with_what_replaced_it(refusal: Refusal) -> None:
    for key in ("quantize.int4.damping", "train.quantization_aware.ramp", "evaluate.batch_tokens"):
        assert f"{key}: removed; {REMOVED[key.rpartition('.')[2]]}" in refusal(SMALL, f"{key}=1")


# ---------------------------------------------------------------- refusals of combinations


COMBINATIONS = """\
  dispersion: null | train.dispersion | null, but the arm 'dispersed' needs it; leave the key out for
  adapter: {kind: lora}~arms: [baseline, active_forgetting] | arms.1 | leaves the embedding frozen
  batch: 128~arms: [baseline, active_forgetting] | arms.1 | drawn anew every 1 steps, but the run has 1
  compile: true~  quantization_aware: int4~quantize: {int4: {method: gptq}} | train.compile | compiled
  quantization_aware: int8~precisions: [fp32] | train.quantization_aware | not among precisions
  quantization_aware: int4~quantize: {int4: {method: k_quant}} | quantize.int4.method | needs rtn or gptq
  quantization_aware: int4~quantize: {budget: 1MB} | train.quantization_aware | cannot be combined
  quantization_aware: int4~  distributed: {fsdp: full_shard} | train.quantization_aware | needs it whole
  quantization_aware: int4~  adapter: {kind: qlora} | train.quantization_aware | needs kind: lora
  quantization_aware: int4~  adapter: {kind: lora, dropout: 0.1} | train.quantization_aware | must be 0
  quantization_aware: int4~  adapter: {kind: lora}~quantize: {int4: {method: gptq}} \
| quantize.int4.method | needs rtn
  distributed: {fsdp: full_shard}~  adapter: {kind: qlora} | train.distributed | cannot divide a quantized
  distributed: {fsdp: full_shard}~arms: [active_forgetting] | arms.0 | FSDP divides the embedding
  adapter: {kind: lora, merge: dequantized} | train.adapter.merge | kind lora keeps its base in fp32
quantize: {budget: 100MB, max_perplexity_increase: 3%} | quantize.budget | take one out
precisions: [fp32]~quantize: {budget: 100MB} | quantize.budget | add int4
"""


def test_combinations_that_cannot_work_are_refused_with_what_would_work(refusal: Refusal) -> None:
    for row in COMBINATIONS.splitlines():
        lines, key, words = row.replace("~", "\n").split(" | ")
        message = refusal(with_line(lines))
        assert f": {key}: " in message and words in message and "\n" not in message, row


# ---------------------------------------------------------------- refusals of files


def test_what_is_no_yaml_mapping_is_refused_with_the_place(refusal: Refusal) -> None:
    for text, start in {
        "a: b: c\n": "r.yaml:1:5: not YAML: ",
        "a:\n\t- b\n": "r.yaml:2:1: not YAML: ",
        "a: *zz\n": "r.yaml:1:4: not YAML: found undefined alias 'zz'",
        "a: 1\n---\nb: 2\n": "r.yaml:2:1: not YAML: ",
        "a: 1\nb: \x01\n": "r.yaml:2: not YAML: unacceptable character #x0001",
        "a: &a [*a, !!int x]\nb: 2026-13-45\n": "r.yaml:2:4: not YAML: month must be in 1..12",
        "a: 1\na: 2\n": 'r.yaml:2:1: not YAML: found duplicate key "a"',
        "a: !!python/object/apply:os.mkdir [x]\n": "r.yaml:1:4: not YAML: could not determine a constructor",
        f"a: {'9' * 5000}\n": "r.yaml:1:4: not YAML: Exceeds the limit",
        "[" * 5000: "r.yaml: nested too deeply",
        "": "r.yaml:1: a recipe is a mapping with name, model, data and train",
        "\n- a\n": "r.yaml:1: a recipe is a mapping",
        "\n".join(f"key{n}: {n}" for n in range(90_000)): "r.yaml: too large",
    }.items():
        assert refusal(text).startswith(start), text[:80]


def test_an_override_of_many_parts_and_an_alias_bomb_are_refused_in_short(refusal: Refusal) -> None:
    assert "\n" not in refusal(SMALL, "a." * 600 + "b=1")
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    bomb = "\n".join(["a0: &a0 [x]", *levels, "name: *a11"])
    assert len(refusal(SMALL.replace("name: small", bomb))) < 5000


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "wikipedia.yaml").write_text(SMALL)
    (tmp_path / "latin.yaml").write_bytes(b"name: x\n# caf\xe9\n")
    for name, words in {
        "zzz.yaml": "zzz.yaml: no such file",
        "": "cannot be read: Is a directory",
        "latin.yaml": "latin.yaml:2: is not UTF-8 (",
    }.items():
        with pytest.raises(BadInput) as caught:
            load(tmp_path / name)
        assert words in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
    | st.sampled_from(["all", "40k", "int4", "lora", "qlora", "gptq", "last", "100MB", "dispersed", [0, 20]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
ALL_KEYS = re.findall(r"^\| `([\w.\[\]]+)` \|", reference(), re.MULTILINE)
KEYS = [key for key in ALL_KEYS if "arms[]" not in key]
PACKAGED = [load(path) for path in sorted(data_folder("recipes").glob("*.yaml"))]
ARMS: list[Any] = [
    "baseline", "dispersed", "neftune", "active_forgetting", "embedding_dropout",
    {"name": "early", "dispersion": {"layers": [0, 1, 2]}}, {"name": "late", "dispersion": {"layers": [20]}},
    {"name": "f10", "active_forgetting": 10}, {"name": "f20", "active_forgetting": 20},
]  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=st.sampled_from(PACKAGED),
    arms=st.none() | st.lists(st.sampled_from(ARMS), max_size=5, unique_by=str),
    changes=st.lists(st.tuples(st.sampled_from(KEYS), JSON), max_size=2),
)
def test_a_changed_recipe_is_refused_or_loads_back_equal_and_its_smoke_validates(
    tmp_path: Path, recipe: Recipe, arms: Any, changes: list[tuple[str, Any]]
) -> None:
    data = recipe.model_dump(mode="json") | ({} if arms is None else {"arms": arms})
    for key, value in changes:
        *sections, last = key.replace("[]", "").split(".")
        section: Any = data
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
            section = section[0] if isinstance(section, list) and section else section
        if isinstance(section, dict):
            section[last] = value
    with (tmp_path / "r.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(data, file)
    try:
        whole = load(tmp_path / "r.yaml")
    except BadInput as refused:
        assert str(refused).startswith(str(tmp_path / "r.yaml"))
        return
    assert whole.steps >= 1
    (tmp_path / "recipe.lock.yaml").write_text(whole.to_yaml(), encoding="utf-8")
    again = load(tmp_path / "recipe.lock.yaml")
    assert again == whole and hash(again) == hash(whole) and again.hash8 == whole.hash8
    assert whole.model.architecture is None or load(tmp_path / "r.yaml", smoke=True).steps >= 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, len(SMALL)),
    length=st.integers(0, 8),
    text=st.text(max_size=6),
    override=st.text(max_size=9),
)
def test_no_text_can_do_more_than_be_refused(
    tmp_path: Path, start: int, length: int, text: str, override: str
) -> None:
    (tmp_path / "r.yaml").write_bytes((SMALL[:start] + text + SMALL[start + length :]).encode())
    for overrides in ([], [f"train.lr={override}"], [override]):
        try:
            load(tmp_path / "r.yaml", overrides)
        except BadInput as refused:
            assert str(refused)


# ---------------------------------------------------------------- what follows from a recipe


def test_steps_are_the_whole_steps_that_the_tokens_pay_for(read: Reader, refusal: Refusal) -> None:
    recipe = read(SMALL, "train.batch=3", "train.accumulate=5", "train.tokens=10k")
    assert (recipe.tokens_per_step, recipe.steps) == (3 * 5 * 64, 10_000 // 960)
    assert "960, or a smaller batch" in refusal(
        SMALL, "train.batch=3", "train.accumulate=5", "train.tokens=959"
    )


def test_the_hash_changes_with_what_changes_the_weights_and_with_nothing_else(read: Reader) -> None:
    same = """name=other precisions=[int4] quantize.int4.group=64 evaluate.limit=3 latency.prompt=9 seeds=3
        arms=[baseline] arms=[{name:x,neftune:3}] targets=[phone-arm64] verify.tokens=64 train.tokens=10_000
        train.lr=0.0001 train.dispersion.weight=10% train.watch_every=3"""
    other = """seed=1 model.base=other data.heldout=10% data.context=32 data.train.0.limit=3 train.lr=2e-4
        train.tokens=20k train.dispersion.weight=0.2 train.adapter.kind=lora"""
    before = read(SMALL).hash8
    for override in same.split():
        assert read(SMALL, override.replace(":", ": ")).hash8 == before, override
    for override in other.split():
        assert read(SMALL, override).hash8 != before, override
    qlora = read(with_line("  adapter: {kind: qlora}"))
    assert json.loads(json.dumps(qlora.identity())) == qlora.identity()
    assert read(with_line("  adapter: {kind: qlora, alpha: 32, base: nf4}")).hash8 == qlora.hash8


# ---------------------------------------------------------------- arms and seeds


def test_an_arms_keys_are_laid_over_the_shared_dispersion_and_seeds_count_up(read: Reader) -> None:
    text = with_line("  dispersion: {weight: 0.5, layers: last, seed: 40}")
    arms = "arms=[dispersed, {name: x, dispersion: {weight: 2, tokens: all}}]"
    runs = read(text, arms, "seeds=2", "seed=7").arm_runs
    assert [
        (run.name, run.replica, run.seed, d.weight, d.tokens, d.layers, d.seed)
        for run in runs
        if (d := run.dispersion)
    ] == [
        ("dispersed", 0, 7, 0.5, 64, "last", 40), ("x", 0, 7, 2.0, "all", "last", 40),
        ("dispersed-seed8", 1, 8, 0.5, 64, "last", 41), ("x-seed8", 1, 8, 2.0, "all", "last", 41),
    ]  # fmt: skip


def test_a_technique_arm_has_dispersion_off_unless_it_asks(read: Reader) -> None:
    text = "arms=[baseline, neftune, {name: both, neftune: 10, dispersion: {}}]"
    adds = {run.arm: run.adds for run in read(SMALL, text).arm_runs}
    assert adds["baseline"] == {} and adds["neftune"] == {"neftune": 5.0}
    assert adds["both"]["neftune"] == 10 and adds["both"]["dispersion"]["weight"] == 0.1


def test_smoke_has_the_same_arms_and_two_seeds(read: Reader) -> None:
    text = SMALL.replace("org/name", "org/name\n  architecture: llama").replace("10k", "10M")
    arms = "[baseline, active_forgetting, {name: x, dispersion: {layers: [20]}, active_forgetting: 500}]"
    runs = read(text, f"arms={arms}", "seeds=5", smoke=True).arm_runs
    assert [run.name for run in runs[:4]] == ["baseline", "active_forgetting", "x", "baseline-seed1"]
    assert len(runs) == 6 and [run.techniques.get("active_forgetting") for run in runs[:3]] == [None, 5, 4]
    assert runs[2].dispersion is not None and runs[2].dispersion.layers == "all"


def test_smoke_cuts_what_costs_time_and_leaves_what_is_tried(read: Reader, refusal: Refusal) -> None:
    assert refusal(SMALL, smoke=True).startswith("r.yaml: model.architecture: missing; --smoke builds a")
    train = "  batch: 16\n  accumulate: 8\n  schedule: linear\n  warmup: 0.2\n  adapter: {kind: lora}\n"
    train += "  dispersion: {layers: [20, 27], weight: 0.3}\nquantize: {budget: 100MB}\n"
    text = SMALL.replace("org/name", "org/name\n  architecture: qwen3").replace("64", "2048")
    text = text.replace("10k", "10M") + train + "evaluate: {tasks: [arc_easy, heldout_cloze]}\n"
    whole = read(text)
    small = smoke(whole)
    assert (
        small.name == "small-smoke" and small.is_smoke and not whole.is_smoke and small.folder == whole.folder
    )
    assert small.steps == 8 and small.train.checkpoint_every == 4 and small.tokens_per_step == 4 * 2 * 128
    assert small.evaluate.tasks == ("heldout_cloze",) and small.evaluate.limit == 8
    assert all(getattr(small, key) == getattr(whole, key) for key in ("model", "arms", "precisions", "seed"))
    for key in ("lr", "warmup", "schedule", "betas", "clip", "precision", "adapter"):
        assert getattr(small.train, key) == getattr(whole.train, key)
    assert small.train.dispersion == whole.train.dispersion.model_copy(update={"layers": "all"})  # type: ignore[union-attr]
    assert small.quantize.budget is None and smoke(small) == small


def test_a_size_has_a_unit(read: Reader, refusal: Refusal) -> None:
    for size in ("100MB", "0.1GB", "100000000", "'100 MB'"):
        assert read(SMALL + f"quantize: {{budget: {size}}}\n").quantize.budget == 10**8
    assert read(SMALL + "quantize: {budget: 95MiB}\n").quantize.budget == 95 * 2**20
    for size in ("MB", "1e20MB", "-1MB", "0"):
        assert "r.yaml:11: quantize.budget: " in refusal(SMALL + f"quantize: {{budget: {size}}}\n")


# ---------------------------------------------------------------- the reference, and what an import costs


def test_the_reference_lists_every_key_once_with_a_meaning() -> None:
    rows = [line.split(" | ") for line in reference().splitlines()[2:]]
    names = [row[0].strip("| `") for row in rows]
    assert len(set(names)) == len(names)
    assert {"name", "data.train[].source", "train.quantization_aware.start", "arms[].neftune"} <= set(names)
    assert all(len(row) == 4 and row[3].strip(" |") for row in rows)


def test_choices_and_defaults_of_dispersion_are_those_of_the_dispersion_package() -> None:
    from edgedisp.dispersion.losses import LAYER_WORDS, DispersionConfig
    from edgedisp.dispersion.losses import VARIANTS as LOSSES

    assert set(get_args(Variant)) == set(LOSSES) and LAYER_NAMES == LAYER_WORDS
    for key, value in Dispersion().model_dump(exclude={"seed", "on"}).items():
        assert getattr(DispersionConfig(), key) == value
