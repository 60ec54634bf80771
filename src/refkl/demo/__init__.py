"""Data, models and rewards of the shipped configurations: a small language model, prompts, preference pairs, rewards.

All of them are made from installed packages, and nothing is downloaded. They are not part of refkl proper: no other
module imports this one. The configs name its functions (`refkl.demo.smollm2.model_folder`,
`refkl.demo.movies.openings`, `refkl.demo.rewards.sentiment`, `refkl.demo.reward_model.model_folder`).
"""
