"""Step-GRPO LoRA Trainer behind its node: policy, learner, run, files, what is shown."""
