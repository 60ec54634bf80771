"""Rewards of completions, called as TRL calls a reward function: a classification model's, and a verifiable task's."""

from refkl.rewards.classifier import RewardModel
from refkl.rewards.tasks import TASK_SOURCE, TaskReward, task_data
from refkl.rewards.text import Message, completion_text

__all__ = ["TASK_SOURCE", "Message", "RewardModel", "TaskReward", "completion_text", "task_data"]
