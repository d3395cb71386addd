"""The `rayssl` command: verbs, their flags, and how errors look. Nothing else lives here."""

import dataclasses
import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pipelines.errors import INTERRUPTED, UserError, nearest
from pipelines.verbs import Embed, FillMask, Index, Samples, Verify, Vocab
from pipelines.verbs_evaluate import Evaluate
from pipelines.verbs_export import Export
from pipelines.verbs_finetune import Finetune, LabelTable
from pipelines.verbs_registry import Models, Promote, Rollback
from pipelines.verbs_search import Duplicates, Nearest

if TYPE_CHECKING:
    from pipelines.config import RunConfig

VERBS: dict[str, Any] = {
    "samples": Samples,
    "index": Index,
    "vocab": Vocab,
    "preview": None,
    "pretrain": None,
    "evaluate": Evaluate,
    "embed": Embed,
    "duplicates": Duplicates,
    "nearest": Nearest,
    "finetune": Finetune,
    "label-table": LabelTable,
    "fill-mask": FillMask,
    "export": Export,
    "verify": Verify,
    "promote": Promote,
    "rollback": Rollback,
    "models": Models,
}

EXIT_CODES = {"FAIL": 1, "REFUSED": 3}
"""Exit codes of a result that tells a status; of any other, 0."""

GOES_ON = {
    "pretrain": "; the same command goes on from the newest commit",
    "finetune": "; the same command begins the training anew",
    "embed": "; the same command goes on after the files that are there",
    "duplicates": "; the same command goes on after the embeddings that are there",
}
"""What is said to who has interrupted a verb."""

HELP = """usage: rayssl VERB [flags] [--json]

  samples      fetch real text or pictures and write them as raw shards
  index        read raw shards once and say what is in them
  vocab        train a vocabulary on raw shards
  preview      show what the model will see; of pictures in preview-RECIPE.png
  pretrain     pretrain an encoder on raw shards, evaluate and register it
  evaluate     measure a run or a model on what it was not trained on, or by labels
  embed        embed what raw shards hold into Parquet files with ids
  duplicates   find near-duplicates by embeddings, and what to drop
  nearest      show which items of an index are most like a text or a picture
  finetune     fine-tune an encoder on labels, measure and register it
  label-table  compare it with the same net from scratch and a linear model
  fill-mask    show what an encoder puts in the place of [MASK]
  export       write an encoder as transformers loads it, or as an ONNX graph
  verify       make every batch of a run anew and compare it with what was consumed
  promote      compare a candidate with the champion; promote it if it is no worse
  rollback     make the previous champion champion again
  models       list registered models, their aliases, figures and what the gate said

rayssl VERB --help tells more. --json prints one JSON object as the last line, of an
error too.
Exit codes: 0 done, 1 failed, 2 usage, 3 not promoted, 65 data that cannot be trusted,
75 try again later, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    given = [argument for argument in given if argument != "--json"]
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"rayssl {importlib.metadata.version('rayssl')}")
        return 0
    try:
        result = _run(given[0], given[1:])
    except UserError as error:
        if "--verbose" in given:
            traceback.print_exception(error)
        return _failed(f"rayssl: {error}", error.exit_code, as_json)
    except KeyboardInterrupt:
        said = f"\nrayssl: interrupted{GOES_ON.get(given[0], '')}"
        return _failed(said, INTERRUPTED, as_json)
    except SystemExit as error:  # tyro has shown what was asked for, or what is wrong with a flag
        if as_json and error.code:
            print(json.dumps({"error": "see standard error", "exit_code": error.code}))
        raise
    if as_json:
        print(json.dumps(result))
    return EXIT_CODES.get(result.get("status", ""), 0)


def _failed(said: str, exit_code: int, as_json: bool) -> int:
    """Say why a verb ended, and return the exit code."""
    print(said, file=sys.stderr)
    if as_json:
        told = said.strip().removeprefix("rayssl: ")
        print(json.dumps({"error": told, "exit_code": exit_code}))
    return exit_code


def _run(verb: str, arguments: list[str]) -> dict[str, Any]:
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}.{nearest(verb, VERBS)}")
    if verb == "pretrain":
        from pipelines.pretrain import pretrain

        return pretrain(_config(verb, arguments))
    if verb == "preview":
        return _preview(_config(verb, arguments))
    command = tyro.cli(VERBS[verb], args=arguments, prog=f"rayssl {verb}")
    result: dict[str, Any] = command.run()
    return result


def _preview(config: "RunConfig") -> dict[str, Any]:
    if config.modality == "images":
        from pipelines.use.preview_images import preview_images

        return preview_images(config, Path(f"preview-{config.recipe}.png"))
    from pipelines.use.preview import preview

    return preview(config)


def _config(verb: str, arguments: list[str]) -> "RunConfig":
    """Return the config of a recipe and flags; without a recipe, list the recipes and exit."""
    from pipelines.config import RunConfig
    from pipelines.recipes import RECIPES, recipe

    if not arguments or arguments[0].startswith("-"):
        print(f"usage: rayssl {verb} RECIPE --data PATTERNS... [--name NAME] [flags]\n")
        for name, make in RECIPES.items():
            print(f"  {name:22} {str(make.__doc__).splitlines()[0]}")
        print(f"\nrayssl {verb} RECIPE --help lists every flag and its value in that recipe.")
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    name, *flags = arguments
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[RunConfig],
        default=recipe(name),
        args=flags,
        prog=f"rayssl {verb} {name}",
        description=RECIPES[name].__doc__,
    )
    if not config.name:
        config = dataclasses.replace(config, name=time.strftime(f"{name}-%Y%m%d-%H%M%S"))
    return config
