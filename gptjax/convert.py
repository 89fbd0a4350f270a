"""Makes a workdir of a Hugging Face model, or a Hugging Face model of a workdir.

python -m gptjax.convert --from_hf=DIR --workdir=runs/imported
python -m gptjax.convert --from_hf=openai-community/gpt2 --workdir=runs/gpt2_124m --dtype=bfloat16
python -m gptjax.convert --workdir=runs/gpt2 --to_hf=DIR
"""

from pathlib import Path
from typing import cast

from absl import flags

from gptjax import cli
from gptjax.config import UserError

FROM_HF = flags.DEFINE_string("from_hf", None, "Hugging Face directory, or OWNER/NAME on its Hub, to import.")
TO_HF = flags.DEFINE_string("to_hf", None, "Directory to write the model of --workdir to; it must be new.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir to read, or with --from_hf to make.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations, with --from_hf.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "With --from_hf: gpt2, cl100k_base, bytes or json:PATH, in place of the directory's own."
)


def main() -> None:
    source, target = FROM_HF.value, TO_HF.value
    if WORKDIR.value is None or (source is None) == (target is None):
        raise UserError("needs --workdir=DIR and one of --from_hf=DIR (to import) and --to_hf=DIR (to export)")
    if source is None and (DTYPE.present or TOKENIZER.present):
        raise UserError("--dtype and --tokenizer are of an import: a workdir is exported with its own")
    from gptjax.interop import huggingface  # after the checks: it takes seconds to import

    workdir = Path(WORKDIR.value).expanduser()
    if source is not None:
        huggingface.import_workdir(source, workdir, cast(huggingface.DType, DTYPE.value), TOKENIZER.value)
        print(f"imported {source} into {workdir}")
    if target is not None:
        huggingface.export_workdir(workdir, Path(target).expanduser())
        print(f"exported {workdir} to {target}")


if __name__ == "__main__":
    cli.run(main)
