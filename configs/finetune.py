"""Fine-tuning on labelled rows, by GPT-1's recipe (Radford et al. 2018, "Improving Language Understanding by
Generative Pre-Training").

    python -m gptjax.main --config=configs/finetune.py:init_from=runs/demo,runlocal --workdir=runs/tweets
    python -m gptjax.main --config=configs/finetune.py:task=entailment,data=tfds:glue/mnli,init_from=runs/gpt2_124m \
        --workdir=runs/mnli --config.data.validation_source=tfds:glue/mnli@validation_matched
    python -m gptjax.main --config=configs/finetune.py:task=ner,data=conll:train.conll,method=lora,init_from=runs/demo \
        --workdir=runs/ner

Arguments: task (a kind of TaskConfig in gptjax/config/sections.py; ner and pos are tagging), data (a source of
gptjax/data/labelled.py; default: hironsan for ner, else tweets), init_from (the workdir of the initial weights;
default: train from scratch), method (a method of PeftConfig), bidirectional (full instead of causal attention, without
the language-model loss), runlocal (for two CPU cores; without init_from a small model).
"""

import ml_collections

from gptjax import config as c
from gptjax.files import expand

TASKS = {
    **{kind: kind for kind in ("classification", "entailment", "similarity", "multiple_choice", "regression")},
    "question_answering": "question_answering",
    "tagging": "tagging",
    "ner": "tagging",
    "pos": "tagging",
}
DATA = {"ner": "hironsan"}  # for other tasks tweets, as no package has rows for them
METRICS = {"regression": "pearson", "tagging": "f1", "question_answering": "f1"}
# none: section 4.1. Methods that train few weights need larger learning rates; these are within the papers' ranges.
PEAK_LR = {"none": 6.25e-5, "lora": 1e-3, "adalora": 2e-3, "adapters": 1e-3, "head": 3e-3, "top_layers": 2e-4}
# Multiples of these for runlocal's small models and few steps, as in docs/finetuning.md.
LOCAL_FACTORS = {"none": 10, "lora": 5, "adalora": 5, "adapters": 5}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(
        arg, task="classification", data="", init_from="", method="none", bidirectional=False, runlocal=False
    )
    kind = c.choose(TASKS, args["task"], "task")
    peak_lr = c.choose(PEAK_LR, args["method"], "method")
    model = c.GPTConfig(context_length=1024)
    if args["init_from"]:
        model = c.read_config(expand(args["init_from"])).model
    elif args["runlocal"]:
        model = c.GPTConfig(context_length=128, num_layers=4, embed_dim=192, num_heads=6, dtype="float32")
    source = args["data"] or DATA.get(args["task"], "tweets")
    dropout = {"embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1}
    config = c.Config(
        stage="finetune",
        init_from=args["init_from"] or None,
        model=model,
        data=c.DataConfig(source=source, tokenizer="gpt2", validation_fraction=0.1),
        task=c.TaskConfig(kind=kind),
        peft=c.PeftConfig(method=args["method"]),
        # Section 4.1: batches of 32 for 3 epochs, warm-up over 0.2 % of training, then linearly to 0.
        batch=c.BatchConfig(epochs=3.0, tokens_per_batch=32 * model.context_length),
        optimizer=c.OptimizerConfig(
            peak_lr=peak_lr,
            schedule="linear",
            warmup_fraction=0.002,
            floor_lr_fraction=0.0,
            beta2=0.999,
            weight_decay=0.01,
        ),
        evaluation=c.EvaluationConfig(every_epochs=1.0, metric=METRICS.get(kind, "accuracy")),
        checkpoint=c.CheckpointConfig(every_epochs=1.0),
    )
    # The workdir of init_from may have bfloat16 parameters, which are too coarse for small updates.
    config = c.replace(config, {"model": dropout | {"param_dtype": "float32"}})
    if args["bidirectional"]:
        config = c.replace(config, {"task": {"bidirectional": True, "lm_weight": 0.0}})
    if args["runlocal"]:
        config = runlocal(config)
        config = runlocal_ner(config) if args["task"] == "ner" else config
    return c.config_dict(config)


def runlocal(config: c.Config) -> c.Config:
    """A small model for a laptop, with a larger learning rate and, from scratch, a tokenizer trained on the rows."""
    return c.replace(
        config,
        {
            "data": {"tokenizer": "bpe:4096"},
            "optimizer": {"peak_lr": LOCAL_FACTORS.get(config.peft.method, 1) * config.optimizer.peak_lr},
        },
    )


def runlocal_ner(config: c.Config) -> c.Config:
    """Named entities of a few hundred sentences: more and smaller batches, and regularisation against overfitting.

    From scratch the model is smaller still. docs/finetuning.md has the measured F1.
    """
    config = c.replace(
        config,
        {
            "task": {"lm_weight": 0.0},
            "regularisation": {"word_dropout": 0.1},
            "batch": {"epochs": 16.0, "tokens_per_batch": 16 * config.model.context_length},
            "optimizer": {"warmup_fraction": 0.1},
        },
    )
    if config.init_from is not None:
        return config
    return c.replace(
        config,
        {"model": {"num_layers": 2, "embed_dim": 128, "num_heads": 4}, "optimizer": {"peak_lr": 1e-3}},
    )
