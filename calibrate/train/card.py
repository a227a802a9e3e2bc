"""The model card of a trained family: what it is, what it was made from, how, and how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantspec.calibrate.train.config import PRESETS, FamilyConfig
from quantspec.models.atomic import write_bytes, write_json

_LICENCES = {
    "gsm8k": "MIT (openai/grade-school-math)",
    "mbpp": "CC-BY-4.0 (google-research/mbpp)",
    "us_speeches": "public domain (US presidential addresses)",
    "python": "PSF-2.0 (Python's standard library)",
}
_POINTS = 8  # of a loss curve


def write(config: FamilyConfig, results: dict[str, Any]) -> None:
    """`README.md` and `family.json` (the results of all stages) in `config.out`."""
    write_json(config.out / "family.json", {"preset": config.preset, "seed": config.seed, "stages": results})
    sections = [_head(config), _data(results["corpus"]), _training(config, results), _quality(results), _limits(config)]
    write_bytes(config.out / "README.md", "\n\n".join(sections).encode() + b"\n")


def _head(config: FamilyConfig) -> str:
    shapes = PRESETS[config.preset]
    rows = [
        (name, s.hidden, s.layers, f"{s.heads} ({s.kv_heads})", s.mlp)
        for name, s in (("target", shapes.target), ("intermediate", shapes.intermediate))
    ]
    return f"""# The default family

Small Llama models made for quantspec's own tests, examples and benchmarks, so that they run offline on trained weights.
Preset `{config.preset}`, seed {config.seed}. Made by `quantspec train family`; licence Apache-2.0, like the code.

| folder | what |
|---|---|
| `target` | the language model, bf16 |
| `target-w4` | the target in 4 bits (GPTQ, group 128, symmetric, compressed-tensors `pack-quantized`) |
| `intermediate` | about an eighth of it, distilled on text of `target-w4`, its own 4-bit rounding included |
| `intermediate-w4` | the intermediate in 4 bits (round to nearest, as in its training) |
| `eagle-target` | EAGLE-1/2 head for `target-w4` |
| `eagle-intermediate` | EAGLE-1/2 head for `intermediate-w4` |

{_table(("model", "hidden", "layers", "heads (kv)", "mlp"), rows)}

Made again by

```
{_command(config)}
```"""


def _command(config: FamilyConfig) -> str:
    data = [f"--data {Path(s.path).name}:{s.weight:g}:{s.held_out}" for s in config.sources]
    names = ["preset", "vocab_size", "target_minutes", "intermediate_minutes", "rollout_tokens", "rollout_minutes"]
    names += ["distill_minutes", "eagle_minutes", "seed"]
    values = [f"--{name.replace('_', '-')} {getattr(config, name)}" for name in names]
    values += [f"--rollout-weights {weight:g}" for weight in config.rollout_weights]
    return " \\\n  ".join(["quantspec train family", *data, *values, "--work WORK --out OUT"])


def _data(corpus: dict[str, Any]) -> str:
    shares = sum(s["weight"] for s in corpus["sources"])
    rows = [
        (s["path"], _licence(s["path"]), f"{s['weight'] / shares:.0%}", s["train_tokens"], s["held_documents"])
        for s in corpus["sources"]
    ]
    table = _table(("source", "licence", "share of rows", "training tokens", "documents held out"), rows)
    return f"""## Data

Byte-level BPE with {corpus["vocab_size"]} entries, digits one by one. Held-out documents (the last ones of the first
source, every twentieth of the others) were used by no stage of training; all figures below are measured on them.

{table}"""


def _training(config: FamilyConfig, results: dict[str, Any]) -> str:
    names = ("target", "intermediate-lm", "intermediate", "eagle-target", "eagle-intermediate")
    rows = [(n, results[n]["steps"], results[n]["tokens"], f"{results[n]['seconds'] / 60:.0f}") for n in names]
    texts = results["rollouts"]
    curves = "\n".join(f"- `{name}`: {_curve(config.work / name / 'log.jsonl')}" for name in names)
    return f"""## Training

{_table(("stage", "steps", "tokens", "minutes"), rows)}

Muon on hidden matrices, AdamW on the rest, warm-up, then linear decay to zero. The intermediate and the heads learned
from {texts["texts"]:,} texts ({texts["tokens"]:,} tokens) that `target-w4` wrote to training prompts at temperatures
0, 0.8 and 1.

Training loss, averaged up to the step in brackets (nats; of heads: features included, and all three draft steps once
there is more than one):

{curves}"""


def _quality(results: dict[str, Any]) -> str:
    sources = [s["path"] for s in results["corpus"]["sources"]]
    rows = [
        (name, *(f"{results[stage][f'held.{i}']:.3f}" for i in range(len(sources))))
        for name, stage in (("target", "target"), ("intermediate before distillation", "intermediate-lm"))
    ]
    w4, middle, held = results["target-w4"], results["intermediate"], results["held-target"]
    heads = {name: results[f"eagle-{name}"] for name in ("target", "intermediate")}
    acceptance = "\n".join(
        f"- EAGLE tree of 15 nodes on the {name}: {head['tree_acceptance']:.2f} tokens per forward, tau {head['tau']}"
        for name, head in heads.items()
    )
    return f"""## Quality

Held-out loss, nats per token:

{_table(("model", *sources), rows)}

On held-out questions, offline simulation over the base's own greedy text. Left out are texts with less than 60%
distinct 4-grams (loops), which are {held["greedy_loops"]} of the target's {held["greedy_texts"]}:

- perplexity of the target {w4["perplexity_before"]:.2f}, in 4 bits {w4["perplexity_after"]:.2f} (mixed held-out text)
- greedy tokens of `target-w4` that the intermediate predicts: {middle["agreement"]:.1%}, rounded to 4 bits
  {middle["agreement_rounded"]:.1%}
- chains of 8 tokens from the rounded intermediate: {middle["chain_acceptance"]:.2f} tokens per target forward
{acceptance}"""


def _limits(config: FamilyConfig) -> str:
    text = """## Limits

Toy models: the form of worked solutions is right, their arithmetic and their sense mostly are not. Not for any use but
trying, testing and measuring quantspec."""
    if config.preset != "cpu":
        return text
    return f"{text} This is the small preset, trained on a CPU; one of preset `gpu` is still due."


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def _licence(name: str) -> str:
    return next((licence for prefix, licence in _LICENCES.items() if name.startswith(prefix)), "see its origin")


def _curve(log: Path) -> str:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    width = max(1, -(-len(losses) // _POINTS))
    spans = [losses[i : i + width] for i in range(0, len(losses), width)]
    # Sources differ much in loss, so single steps would show noise.
    return ", ".join(f"{sum(v for _, v in s) / len(s):.2f} (to {s[-1][0]})" for s in spans) or "no log"
