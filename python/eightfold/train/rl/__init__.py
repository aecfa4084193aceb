"""Reinforcement learning with verifiable rewards: tasks, verifiers, advantages, the policy objective, meters."""
