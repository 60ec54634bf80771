"""What the quickstart trains: a small language model, prompts, preference pairs and a reward, from installed packages.

Nothing here is downloaded and nothing here is part of refkl proper: no other module imports this one. The configs name
its functions (`refkl.demo.smollm2.model_folder`, `refkl.demo.movies.openings`, `refkl.demo.rewards.sentiment`).
"""
