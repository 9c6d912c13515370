"""The closed loop in one program: the language of calls, tools over ready features, memory, the rollout.

What learns from it is in iv3jax/train. Nothing is imported here; import the module you mean.
"""
