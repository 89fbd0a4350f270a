"""Converts Hugging Face models to workdirs and workdirs to Hugging Face models; LoRA matrices too, in PEFT's format.

python -m gptjax.convert --from_hf=DIR --workdir=runs/imported
python -m gptjax.convert --from_hf=openai-community/gpt2 --workdir=runs/gpt2_124m --dtype=bfloat16
python -m gptjax.convert --workdir=runs/gpt2 --to_hf=DIR [--step=N | --best]
python -m gptjax.convert --from_peft=DIR --base=runs/gpt2_124m --workdir=runs/lora
python -m gptjax.convert --workdir=runs/lora --to_peft=DIR
"""

from typing import Any, cast

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.files import expand

FROM_HF = flags.DEFINE_string("from_hf", None, "Hugging Face directory, or OWNER/NAME on its Hub, to import.")
TO_HF = flags.DEFINE_string(
    "to_hf", None, "Directory to write the model of --workdir to, LoRA folded in; it must be new."
)
FROM_PEFT = flags.DEFINE_string(
    "from_peft", None, "Directory of Hugging Face PEFT with LoRA matrices to import, over the weights of --base."
)
TO_PEFT = flags.DEFINE_string("to_peft", None, "Directory to write the LoRA matrices of --workdir to; it must be new.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir to read, or with --from_hf and --from_peft to create.")
BASE = flags.DEFINE_string("base", None, "With --from_peft: workdir of the weights that the matrices are for.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "With --from_hf: dtype of activations.")
PARAM_DTYPE = flags.DEFINE_enum(
    "param_dtype",
    "float32",
    ["float32", "bfloat16"],
    "With --from_hf: dtype of the parameters. bfloat16 halves them, for a model that is not trained.",
)
CHECKPOINT = cli.CheckpointFlags()
TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "With --from_hf: gpt2, cl100k_base, o200k_base, o200k_harmony, bytes or json:PATH, instead of the directory's own.",
)


def main() -> None:
    given = {flag.name: flag.value for flag in (FROM_HF, TO_HF, FROM_PEFT, TO_PEFT)}
    ways = [name for name, value in given.items() if value is not None]
    if WORKDIR.value is None or len(ways) != 1:
        raise UserError(
            "needs --workdir=DIR and one of --from_hf=DIR, --from_peft=DIR (to import), --to_hf=DIR and --to_peft=DIR "
            "(to export)"
        )
    (way,) = ways
    if way != "from_hf" and (DTYPE.present or PARAM_DTYPE.present or TOKENIZER.present):
        raise UserError("--dtype, --param_dtype and --tokenizer are for --from_hf: a workdir has its own")
    if way.startswith("from") and (CHECKPOINT.best or CHECKPOINT.step is not None):
        raise UserError("--step and --best choose a checkpoint of a workdir to export, by --to_hf or --to_peft")
    if (way == "from_peft") != (BASE.value is not None):
        raise UserError("--from_peft and --base need each other: LoRA matrices are for the weights of a workdir")
    from gptjax.interop import adapters, huggingface  # after the checks: it takes seconds to import

    workdir, place = expand(WORKDIR.value), str(given[way])
    directory = expand(place)
    if way == "from_hf":
        dtype, param_dtype = cast(Any, DTYPE.value), cast(Any, PARAM_DTYPE.value)
        huggingface.import_workdir(place, workdir, dtype, TOKENIZER.value, param_dtype)
    elif way == "to_hf":
        huggingface.export_workdir(workdir, directory, best=CHECKPOINT.best, step=CHECKPOINT.step)
    elif way == "from_peft":
        adapters.import_adapter(directory, expand(str(BASE.value)), workdir)
    else:
        adapters.export_adapter(workdir, directory, best=CHECKPOINT.best, step=CHECKPOINT.step)
    print(f"imported {place} into {workdir}" if way.startswith("from") else f"exported {workdir} to {place}")


if __name__ == "__main__":
    cli.run(main)
