"""Verifiable rewards: functions for rl.reward=python:examples.rewards.NAME in stages ppo and grpo.

    python -m gptjax.main --config=configs/chatgpt.py:stage=grpo,init_from=runs/sft,runlocal --workdir=runs/grpo \
        --config.rl.reward=python:examples.rewards.ends_in_question

Each takes the messages before a completion, the completion, and the reference completion of the data, or None. With a
parameter `finish_reason` a function also gets "end_of_turn", "end_of_text" or, for a completion that was cut off at
rl.response_tokens, "length".
"""

from collections.abc import Sequence

Messages = Sequence[dict[str, str]]


def ends_in_question(messages: Messages, completion: str, reference: str | None) -> float:
    """Returns 1 if the completion ends in a question mark, else 0."""
    return float(completion.rstrip().endswith("?"))


def is_finished_question(messages: Messages, completion: str, reference: str | None, finish_reason: str) -> float:
    """Returns 1 if the completion ends in a question mark and was not cut off, else 0."""
    return float(completion.rstrip().endswith("?") and finish_reason != "length")


def says_you(messages: Messages, completion: str, reference: str | None) -> float:
    """Returns the number of times that the completion says "you", at most three, divided by three."""
    words = [word.strip(".,;:!?\"'").lower() for word in completion.split()]
    return min(words.count("you"), 3) / 3
