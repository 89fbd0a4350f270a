"""Rewards that can be checked: functions for rl.reward=python:examples.rewards.NAME of stages ppo and grpo.

    python -m gptjax.main --config=configs/chatgpt.py:stage=grpo,init_from=runs/sft,runlocal --workdir=runs/grpo \
        --config.rl.reward=python:examples.rewards.ends_in_question

Each takes the messages that come before an answer, the answer, and the answer that is there in the data, or None.
"""

from collections.abc import Sequence

Messages = Sequence[dict[str, str]]


def ends_in_question(messages: Messages, answer: str, reference: str | None) -> float:
    """1 where the answer ends in a question mark, 0 elsewhere."""
    return float(answer.rstrip().endswith("?"))


def says_you(messages: Messages, answer: str, reference: str | None) -> float:
    """How often the answer says "you", of at most three times, as a number in [0, 1]."""
    words = [word.strip(".,;:!?\"'").lower() for word in answer.split()]
    return min(words.count("you"), 3) / 3
