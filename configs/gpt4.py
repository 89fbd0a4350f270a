"""Images and text in, text out, as GPT-4 (OpenAI 2023). Its architecture is not published: this has the form of
LLaVA-1.5 (Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"), with any GPT of this library.

    python -m gptjax.main --config=configs/gpt4.py:runlocal --workdir=runs/digits
    python -m gptjax.main --config=configs/gpt4.py:stage=align,init_from=runs/demo,runlocal --workdir=runs/align
    python -m gptjax.main --config=configs/gpt4.py:stage=instruct,init_from=runs/align,runlocal --workdir=runs/instruct
    python -m gptjax.main --config=configs/gpt4.py:stage=pretrain,runlocal --workdir=runs/documents
    python -m gptjax.main --config=configs/gpt4.py:stage=align,init_from=runs/llava,data=jsonl:captions.jsonl \
        --workdir=runs/align

Arguments: stage (scratch: all weights from a random initialisation; pretrain: the same on documents with images between
their words, as Flamingo, Alayrac et al. 2022; align: the projector, and the encoder where
init_from has none; instruct: the projector and the text model), data and validation (sources of
gptjax/data/conversations.py; default: scikit-learn's digits), init_from (the workdir of a text model, or of imported
LLaVA weights), encoder (vit or patches, for a model that has none), runlocal (for two CPU cores).
"""

import dataclasses

import ml_collections

from gptjax import config as c
from gptjax.files import expand

NO_DROPOUT = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
TEXT_MODEL = "(?!vision/).*"  # all parameters but those of the image encoder and the projector
PROJECTOR = "vision/projector_.*"


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, stage="scratch", data="", validation="", init_from="", encoder="vit", runlocal=False)
    stage = c.choose(
        {"scratch": scratch, "pretrain": scratch, "align": align, "instruct": instruct}, args["stage"], "stage"
    )
    c.choose({"vit": None, "patches": None}, args["encoder"], "encoder")
    model = c.GPTConfig(context_length=2048)
    chat = c.ChatConfig()
    if args["init_from"]:
        given = c.read_config(expand(args["init_from"]))
        model = c.replace(given, {"model": NO_DROPOUT | {"param_dtype": "float32"}}).model
        chat = chat_of(given, args["stage"])
    elif args["runlocal"]:
        model = c.GPTConfig(context_length=128, num_layers=3, embed_dim=128, num_heads=4, dtype="float32")
        chat = LOCAL_FORMAT
    if args["stage"] == "pretrain":
        chat = PLAIN_TEXT
    if not model.reads_images:
        vision = LOCAL_VISION if args["runlocal"] else c.VisionConfig()
        model = dataclasses.replace(model, vision=with_encoder(vision, args["encoder"]))
    packaged = not args["data"]
    form = {"pretrain": ":documents", "align": ":captions"}.get(args["stage"], "")
    config = c.Config(
        stage="sft",
        init_from=args["init_from"] or None,
        model=model,
        data=c.DataConfig(
            source=f"digits:train{form}" if packaged else args["data"],
            validation_source=f"digits:test{form}" if packaged else args["validation"] or None,
            tokenizer="gpt2",
            image_shift=0.125 if packaged else 0.0,  # one pixel
        ),
        chat=chat,
        # LLaVA-1.5's scripts: one epoch, cosine to 0 after a warm-up of 3 %, no weight decay.
        optimizer=c.OptimizerConfig(
            beta2=0.999, weight_decay=0.0, floor_lr_fraction=0.0, warmup_fraction=0.03, schedule="cosine"
        ),
        evaluation=c.EvaluationConfig(every_epochs=0.25, sample_tokens=0),
        checkpoint=c.CheckpointConfig(every_epochs=0.25),
    )
    config = stage(config)
    return c.config_dict(runlocal(config, args["stage"]) if args["runlocal"] else config)


# A vision transformer for the 8 x 8 pixels of scikit-learn's digits; a choice.
LOCAL_VISION = c.VisionConfig(
    encoder="vit", image_size=8, patch_size=4, num_layers=2, num_heads=4, embed_dim=64, read_layer=-1
)


# Few tokens around the messages: most of the time goes into tokens.
LOCAL_FORMAT = c.ChatConfig(
    template="custom",
    system_format="{content}",
    user_format="<|user|>{content}",
    assistant_format="<|assistant|>{content}<|end|>",
)
# Documents, and a text model that knows no chat format: no further tokens. In align, a caption follows upon its image,
# as in LLaVA: what a frozen model writes behind a token of text depends less on the images before it.
PLAIN_TEXT = c.ChatConfig(template="none")
ANSWER_FORMAT = c.ChatConfig(
    template="custom",
    system_format="{content}\n",
    user_format="{content}\n",
    assistant_format="{content}<|endoftext|>",
)


def with_encoder(vision: c.VisionConfig, encoder: str) -> c.VisionConfig:
    """The settings of images with another encoder; those that it does not read keep their values."""
    return dataclasses.replace(vision, encoder=encoder)


def chat_of(given: c.Config, stage: str) -> c.ChatConfig:
    """The chat format of the run to start from, or one for a text model that knows none."""
    from gptjax.stages import registry  # takes seconds to import

    if stage == "align" and not registry.definition(given).chats and not given.model.reads_images:
        return PLAIN_TEXT
    return ANSWER_FORMAT if stage == "instruct" and given.chat == PLAIN_TEXT else given.chat


def scratch(config: c.Config) -> c.Config:
    """All weights from a random initialisation; learning rate and batch are those of instruct, a choice."""
    return c.replace(config, {"batch": _batch(config, 128), "optimizer": {"peak_lr": 2e-5}})


def align(config: c.Config) -> c.Config:
    """Section 3.4 and the released scripts: the projector alone, batches of 256, learning rate 1e-3."""
    return c.replace(
        config,
        {
            "peft": {"method": "parts", "trained": (PROJECTOR,)},
            "batch": _batch(config, 256),
            "optimizer": {"peak_lr": 1e-3},
        },
    )


def instruct(config: c.Config) -> c.Config:
    """Projector and text model, with the vision encoder frozen; batches of 128, learning rate 2e-5."""
    return c.replace(
        config,
        {
            "peft": {"method": "parts", "trained": (PROJECTOR, TEXT_MODEL)},
            "batch": _batch(config, 128),
            "optimizer": {"peak_lr": 2e-5},
        },
    )


def runlocal(config: c.Config, stage: str) -> c.Config:
    """The same for a small model on a laptop; learning rates and lengths of training are choices."""
    epochs = 12.0 if stage == "instruct" else 48.0  # align has taught the encoder, and its captions are short
    return c.replace(
        config,
        {
            "data": {"tokenizer": "bpe:400"},
            # Larger than for wide models: 1 / sqrt(width) is 0.09.
            "model": {"kernel_init_std": 0.06},
            "batch": _batch(config, 8, epochs),
            "optimizer": {"peak_lr": 3e-3 if stage == "align" else 1.5e-3, "beta2": 0.99, "warmup_fraction": 0.05},
            "evaluation": {"every_epochs": epochs / 6},
            "checkpoint": {"every_epochs": epochs / 6},
        },
    )


def _batch(config: c.Config, rows: int, epochs: float = 1.0) -> dict[str, float]:
    return {"tokens_per_batch": rows * config.model.context_length, "epochs": epochs}
