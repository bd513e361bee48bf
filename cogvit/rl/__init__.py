"""Stage 4: joint reinforcement learning over many tasks. Tasks, what judges their answers, and the policy's loss."""
