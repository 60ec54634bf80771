"""Reward functions for TRL: a classification model's score, and the check of a verifiable task."""

from refkl.rewards.classifier import RewardModel
from refkl.rewards.tasks import TASK_SOURCE, TaskReward, task_data
from refkl.rewards.text import Message, completion_text

__all__ = ["TASK_SOURCE", "Message", "RewardModel", "TaskReward", "completion_text", "task_data"]
