"""``quantspec generate``: text from a prompt, streamed, with any drafter or none."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantspec.cli.memory import show_memory
from quantspec.cli.options import Flag, KeyValue, assemble, options_from
from quantspec.cli.places import with_profile
from quantspec.cli.render import note, stage_colors, stats_line, use_color
from quantspec.cli.signals import Stop
from quantspec.engine.config import METHODS, MODES, EngineConfig
from quantspec.errors import Interrupted, UsageError
from quantspec.types import SamplingParams

if TYPE_CHECKING:
    from quantspec.engine.llm import LLM
    from quantspec.engine.request import Completion

SAMPLING = {
    "max_new_tokens": Flag(("-n", "--max-tokens"), "Stop after this many tokens."),
    "min_new_tokens": Flag(help="Do not end before this many tokens."),
    "temperature": Flag(("--temp",), "0 is greedy: always the most likely token."),
    "top_k": Flag(help="Sample among this many most likely tokens; 0 is off."),
    "top_p": Flag(help="Sample among the most likely tokens that hold this probability; 1 is off."),
    "min_p": Flag(help="Drop tokens below this share of the most likely one's probability; 0 is off."),
    "repetition_penalty": Flag(help="Divide the scores of tokens in prompt and output; 1 is off."),
    "presence_penalty": Flag(help="Subtract once from the scores of tokens in the output."),
    "frequency_penalty": Flag(help="Subtract per occurrence from the scores of tokens in the output."),
    "logit_bias": Flag(help="Add to a token's score (may be repeated).", metavar="ID=NUMBER", type=KeyValue()),
    "stop": Flag(help="End before this string (may be repeated)."),
    "stop_token_ids": Flag(help="End at this token id (may be repeated)."),
    "ignore_eos": Flag(help="Go on past the end token."),
    "seed": Flag(("-s",), "The same seed gives the same text. Default: a random one, reported."),
    "logprobs": Flag(help="Report log-probabilities of each token and of this many alternatives (with --json)."),
}
ENGINE = {
    "model": Flag(("-m",), "Folder, GGUF file, hub id, or a member of the default family."),
    "method": Flag(
        help="What proposes tokens. Default: auto once the model is tuned, else the best the given parts allow.",
        metavar="|".join(METHODS),
    ),
    "draft_model": Flag(("--spec-model",), "The draft model of method draft, the intermediate of method cascade."),
    "head": Flag(help="Folder of an EAGLE head, or of Medusa heads."),
    "profile": Flag(help="What quantspec tune wrote. Default: that of this model on this machine.", metavar="FILE"),
    "num_speculative_tokens": Flag(("--num-draft-tokens", "--spec-tokens"), "Most draft tokens in one target forward."),
    "min_draft": Flag(help="Tokens that a cascade gathers before it asks the target."),
    "tree_nodes": Flag(help="Nodes of a cascade's tree."),
    "tree_depth": Flag(help="Levels of a head's tree."),
    "tree_top_k": Flag(help="Children per node of a head's tree."),
    "prompt_lookup_max": Flag(help="Longest n-gram that prompt lookup matches."),
    "prompt_lookup_min": Flag(help="Shortest n-gram that prompt lookup matches."),
    "rule": Flag(help="ratio: equal in distribution only, for chains."),
    "mode": Flag(help="fast: equal up to rounding only. Default: exact on a CPU, else fast.", metavar="|".join(MODES)),
    "device": Flag(help="cpu, cuda, cuda:1, ..."),
    "backend": Flag(help="Kernels to run on. Default: the fastest that can (quantspec doctor).", metavar="NAME"),
    "activations": Flag(help="What activations are rounded to. Default: the fastest; fp32 is nearest to the weights."),
    "kv_cache_dtype": Flag(help="What the target's keys and values are kept in; auto: unquantized."),
    "dtype": Flag(help="What activations are kept in; auto: bfloat16 on a GPU's own kernels, else float32."),
    "head_bits": Flag(help="Bits of an LM head that is stored unquantized. Default: the backend's.", metavar="4|8|16"),
    "max_context": Flag(help="Tokens of context to hold. Default: the model's own limit."),
    "threads": Flag(help="CPU threads. Default: one per core."),
}
# `-n` is the number of new tokens here, as in llama.cpp, so the number of samples gets a full name.
NOT_OPTIONS = ("n",)
INTERNAL = ("max_batch", "prefill_chunk")


@click.command
@click.argument("prompt", required=False)
@click.option("--prompt-file", "-f", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option("--num-samples", type=int, default=SamplingParams().n, show_default=True, help="Texts to generate.")
@options_from(SamplingParams, SAMPLING, skip=NOT_OPTIONS)
@options_from(EngineConfig, ENGINE, skip=INTERNAL)
@click.option("--speculative-config", metavar="JSON", help="vLLM's speculative_config: a JSON object, or @FILE.")
@click.option("--dry-run", is_flag=True, help="Load nothing: tell what memory it would take, and whether it fits.")
@click.option("--show-stages", is_flag=True, help="Colour each token by the level that proposed it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (with --num-samples a list).")
@click.pass_context
def generate(
    ctx: click.Context,
    prompt: str | None,
    prompt_file: Path | None,
    num_samples: int,
    speculative_config: str | None,
    dry_run: bool,
    show_stages: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text that continues PROMPT (or --prompt-file, or standard input).

    Without --model, the default family that comes with quantspec. The text is the same with every method: drafters
    change how fast it comes, never what it says.
    """
    params = assemble(SamplingParams, options, n=num_samples)
    config = with_profile(_engine_config(ctx, options, speculative_config))
    if dry_run:
        asked = None if prompt is None and prompt_file is None else _read_prompt(prompt, prompt_file)
        return show_memory(config, params, asked, as_json=as_json)
    text = _read_prompt(prompt, prompt_file)
    if params.logprobs is not None and not as_json:
        raise UsageError("log-probabilities are only reported as JSON", hint="add --json")
    from quantspec.engine.llm import load  # torch comes with it

    chosen = {field.name: getattr(config, field.name) for field in fields(config)}
    llm = load(**chosen, notice=note)
    completions, signal_code = _generate(llm, text, params, stream=not as_json, show_stages=show_stages)
    if as_json:
        records = [_record(completion) for completion in completions]
        click.echo(json.dumps(records if num_samples > 1 else records[0], ensure_ascii=False))
    if signal_code:
        stopped = Interrupted("interrupted; the text is not whole")
        stopped.exit_code = signal_code
        raise stopped


def _engine_config(ctx: click.Context, options: dict[str, Any], speculative: str | None) -> EngineConfig:
    config = assemble(EngineConfig, options)
    if speculative is None:
        return config
    keys = _read_json(speculative)
    for name in ENGINE.keys() - {"model"}:
        given = ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and (name in keys or name == "method"):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} and --speculative-config both speak of {name}", hint="give one of them")
    return config.with_speculative(keys, note)


def _read_json(text: str) -> dict[str, Any]:
    source = "--speculative-config"
    if text.startswith("@"):
        source = text[1:]
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {source}: {error}") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{source} is not JSON: {error}", hint='like {"method": "ngram", "num_speculative_tokens": 8}'
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f"{source} is not a JSON object")
    return value


def _read_prompt(prompt: str | None, path: Path | None) -> str:
    if prompt is not None and path is not None:
        raise UsageError("two prompts: an argument and --prompt-file", hint="give one of them")
    if prompt is not None and prompt != "-":
        return prompt
    try:
        if path is not None:
            return path.read_bytes().decode()
        if prompt is None and sys.stdin.isatty():
            raise UsageError("no prompt", hint='like: quantspec generate "Once upon a time"')
        return sys.stdin.buffer.read().decode()
    except OSError as error:
        raise UsageError(f"cannot read the prompt: {error.strerror}: {path}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _generate(
    llm: LLM, prompt: str, params: SamplingParams, *, stream: bool, show_stages: bool
) -> tuple[list[Completion], int]:
    """Run to the end, or to the first signal, which keeps what is there: its exit code comes second."""
    generation = llm.stream(prompt, params)
    painter = stage_colors(llm.tokenizer, enabled=show_stages and use_color(sys.stdout))
    with Stop("stopping after this token", then=generation.cancel) as stop:
        for chunk in generation:
            if stream and params.n == 1:
                sys.stdout.write(painter(chunk))
                sys.stdout.flush()
    completions = generation.completions
    if stream:
        if params.n == 1:
            click.echo()
        for completion in completions if params.n > 1 else ():
            click.echo(f"--- sample {completion.index + 1}\n{completion.text}")
        for completion in completions:
            click.echo(stats_line(completion, legend=show_stages), err=True)
    return completions, stop.code


def _record(completion: Completion) -> dict[str, Any]:
    record = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "stats": completion.stats.as_dict(),
    }
    if completion.logprobs:
        record["logprobs"] = [
            {"token_id": each.token, "logprob": each.logprob, "top": [list(pair) for pair in each.top]}
            for each in completion.logprobs
        ]
    return record
